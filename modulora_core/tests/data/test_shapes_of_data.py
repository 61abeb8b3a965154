"""Data as people have it: tool calls, parts, lists of messages, tables, saved datasets, tokens."""

import json

import datasets
import pyarrow.parquet
import pytest

from modulora_core.data import load_examples, load_text
from modulora_core.data.sources import load_records
from modulora_core.errors import DataError
from modulora_core.tests.tiny_tokenizer import make_tokenizer, write_jsonl

TEMPLATE = (
    "{%- if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}<tool>{{ m.content }}\n"
    "{%- else %}<{{ m.role }}>{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}</s>\n{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = {"role": "user", "content": "Rain in Oslo?"}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]


def calling(arguments):
    function = {"name": "rain", "arguments": arguments}
    return {"role": "assistant", "content": None,
            "tool_calls": [{"type": "function", "function": function}]}  # fmt: skip


TOOL_CHAT = [
    ASKED,
    calling({"city": "Oslo"}),
    {"role": "tool", "content": "9 mm"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(template=TEMPLATE)


def trained(tokenizer, record):
    """The text of a record's only example, and the parts of it that are trained."""
    source = [record] if isinstance(record, dict) else record
    (example,) = load_examples(source, tokenizer, seq_len=512)
    parts = [[]]
    for label in example["labels"]:
        if label != -100:
            parts[-1].append(label)
        elif parts[-1]:
            parts.append([])
    return tokenizer.decode(example["input_ids"]), [tokenizer.decode(p) for p in parts if p]


def test_tool_calls_are_trained_as_the_template_writes_them(tokenizer):
    text, answers = trained(tokenizer, {"messages": TOOL_CHAT, "tools": TOOLS})
    expected = tokenizer.apply_chat_template(
        [turn | {"content": turn["content"] or ""} for turn in TOOL_CHAT], tools=TOOLS,
        tokenize=False,
    )  # fmt: skip
    assert text == expected.rstrip()
    assert answers == ['<call>rain{"city": "Oslo"}</s>', "Yes.</s>"]
    for same in (
        {"messages": [ASKED, calling('{"city": "Oslo"}'), *TOOL_CHAT[2:]], "tools": TOOLS},
        {"messages": TOOL_CHAT, "tools": json.dumps(TOOLS)},
        {"prompt": [ASKED], "completion": TOOL_CHAT[1:], "tools": TOOLS},
    ):
        assert trained(tokenizer, same) == (text, answers)


NULLS = {"city": None, "n": [1, None], "o": {"k": None}}


def test_nulls_that_the_user_wrote_are_trained(tokenizer, tmp_path):
    tools = [{"type": "function", "function": {"name": "rain", "default": None}}]
    chats = [
        {"messages": [ASKED, calling(NULLS)], "tools": tools},
        {"messages": [ASKED, calling(json.dumps(NULLS))], "tools": json.dumps(tools)},
    ]
    parquet = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats[1:]), parquet)
    jsonl = write_jsonl(tmp_path / "chats.jsonl", chats[0])
    mixed = write_jsonl(tmp_path / "mixed.jsonl", chats[0] | {"messages": [ASKED, calling(0)]},
                        chats[0])  # fmt: skip
    loaded = datasets.Dataset.from_json(str(mixed), cache_dir=str(tmp_path / "cache")).select([1])
    for source in (chats[:1], chats[1:], jsonl, parquet):
        text, (answer,) = trained(tokenizer, source)
        assert answer == f"<call>rain{json.dumps(NULLS)}</s>"
        assert '"default": null' in text
    loaded.save_to_disk(tmp_path / "saved")
    for source in (loaded, tmp_path / "saved"):  # arguments of several types have the type Json
        assert trained(tokenizer, source)[1] == [f"<call>rain{json.dumps(NULLS)}</s>"]


def test_nulls_that_a_table_adds_are_left_out(tokenizer, tmp_path):
    two = [{**call, "function": {"name": "snow", "arguments": {"month": 1}}}
           for call in calling(0)["tool_calls"]]  # fmt: skip
    rows = [{"messages": TOOL_CHAT}, {"messages": [ASKED, {**calling(0), "tool_calls": two}]}]
    table = pyarrow.Table.from_pylist(rows)
    added = table["messages"][0][1]["tool_calls"][0]["function"]["arguments"]["month"]
    assert added.as_py() is None
    expected = [dict(x) for x in load_examples(rows, tokenizer, seq_len=512)]
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(tmp_path / "saved")
    for source in (table, dataset, tmp_path / "chats.parquet", tmp_path / "saved"):
        found = load_examples(source, tokenizer, seq_len=512)
        assert [dict(x) for x in found] == expected, source


def test_trls_trainer_makes_the_same_tokens(tunable, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="pip install trl")
    from modulora_core import add_lora, load_model

    model = load_model(tunable, device="cpu")
    add_lora(model)
    answer = [{"role": "assistant", "content": "Yes."}]
    for record in (
        {"prompt": [ASKED], "completion": answer},
        {"prompt": [ASKED], "completion": TOOL_CHAT[1:], "tools": json.dumps(TOOLS)},
    ):
        arguments = trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        rows = datasets.Dataset.from_list([record])
        (made,) = trl.SFTTrainer(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer
        ).train_dataset
        (ours,) = load_examples(rows, tokenizer, seq_len=512)
        length = len(ours["input_ids"])  # the template's line end after an answer isn't trained
        assert made["input_ids"][:length] == ours["input_ids"]
        prompt = next(i for i, label in enumerate(made["labels"]) if label != -100)
        assert all(label == -100 for label in ours["labels"][:prompt])
        assert ours["labels"][prompt] == made["labels"][prompt]


TOKENS = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}


@pytest.mark.parametrize(
    "record",
    [
        TOKENS,
        TOKENS | {"text": "its source", "attention_mask": [1] * 5},
        {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 8, 9], "assistant_masks": [0, 0, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 8, 9, 0, 0], "labels": [-100, -100, 7, 8, 9, -100, -100],
         "attention_mask": [1, 1, 1, 1, 1, 0, 0]},
        {"input_ids": [0, 5, 6, 7, 8, 9], "completion_mask": [0, 0, 0, 1, 1, 1],
         "attention_mask": [0, 1, 1, 1, 1, 1]},
    ],
)  # fmt: skip
def test_tokens_are_trained_as_they_are(tokenizer, record):
    (found,) = load_examples([record], tokenizer, seq_len=16)
    assert found == TOKENS
    (cut,) = load_examples([record], tokenizer, seq_len=4)
    assert cut == {name: column[:4] for name, column in TOKENS.items()}


def test_examples_without_a_trained_token_are_counted_apart(tokenizer, caplog):
    rows = [TOKENS, {"input_ids": []}, {"input_ids": [5, 6], "labels": [5, -100]}]
    report = load_examples(rows, tokenizer, seq_len=16).report
    assert (report.examples, report.dropped, report.untrained) == (1, 0, 2)
    assert "2 of 3 examples have no token to train and are left out" in caplog.text
    assert "longer" not in caplog.text
    with pytest.raises(DataError, match="starts within seq_len 2, got none of 1; raise seq_len"):
        load_examples(rows, tokenizer, seq_len=2)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, 6], "labels": [6, 7]}, r"labels: expected -100 or the token .* got 6"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels: expected as many as input_ids, 2, got 1"),
        ({"input_ids": [5, 6], "labels": [-100, 6], "completion_mask": [0, 1]},
         "expected labels or completion_mask, got both; leave one out"),
        ({"input_ids": "5 6"}, "input_ids: expected a valid list, got '5 6'"),
        ({"messages": [ASKED, {**calling({}), "tool_calls": [{"name": "rain"}]}]},
         "tool_calls: expected a function with name and arguments"),
        ({"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "message 1: role: expected system, user, assistant, tool, .* got 'usr'"),
        ({"prompt": [], "completion": "a"}, "prompt: expected a string, or a list of messages"),
        ({"prompt": [ASKED], "completion": [ASKED]}, "turn of the assistant to train, got only us"),
    ],
)  # fmt: skip
def test_unusable_shapes_are_refused(tokenizer, tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        load_examples(write_jsonl(tmp_path / "data.jsonl", record), tokenizer, seq_len=512)


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DROPS = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}"
    "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = CHATML.replace("{% for m", "{# 'critic' #}{% for m")


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (CHATML, {"messages": TOOL_CHAT}, "chat template knows no tool_calls; take a model"),
        (CHATML, {"messages": [ASKED, TOOL_CHAT[-1]], "tools": TOOLS}, "knows no tools"),
        (DROPS, {"messages": [ASKED, TOOL_CHAT[2], TOOL_CHAT[3]]}, "leaves out turns of tool"),
        (CHATML, {"messages": [{"role": "critic", "content": "x"}, TOOL_CHAT[3]]}, "got 'critic'"),
        (NAMES, {"messages": [{"role": "critic", "content": "x"}, TOOL_CHAT[3]]}, None),
        (CHATML, {"messages": [ASKED, TOOL_CHAT[2], TOOL_CHAT[3]]}, None),
    ],
)
def test_a_turn_that_the_template_does_not_know_is_refused(template, record, message):
    tokenizer = make_tokenizer(template=template)
    if message is None:
        assert trained(tokenizer, record)[1] == ["Yes.</s>"]
        return
    with pytest.raises(DataError, match=f"record 1: .*{message}"):
        load_examples([record], tokenizer, seq_len=512)


ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\td", "completion": 'e "f"'}]


def test_tables_in_memory_are_records(tokenizer):
    pandas = pytest.importorskip("pandas")
    frames = [pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS), pandas.DataFrame(ROWS)[::-1]]
    for frame in frames[:2]:
        assert [record.fields for record in load_records(frame)] == ROWS
    assert [record.fields for record in load_records(frames[2])] == ROWS[::-1]
    gaps = pandas.DataFrame({"text": ["a", None, "c"], "n": [1.0, None, 3.0]})
    assert [r.fields["n"] for r in load_records(gaps)] == [1.0, None, 3.0]
    assert load_records(gaps)[1].fields == {"text": None, "n": None}
    twice = {**calling({}), "tool_calls": calling({})["tool_calls"] * 2}
    chats = [{"messages": TOOL_CHAT, "tools": TOOLS}, {"messages": [ASKED, twice]}]
    expected = [dict(x) for x in load_examples(chats, tokenizer, seq_len=512)]
    stored = pyarrow.Table.from_pylist(chats).to_pandas()  # lists are arrays of NumPy there
    for frame in (pandas.DataFrame(chats), stored):
        assert [dict(x) for x in load_examples(frame, tokenizer, seq_len=512)] == expected


def test_a_saved_dataset_is_read(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "several")
    for name, expected in (
        ("one", ROWS),
        ("several", ROWS),
        ("several:train", ROWS),
        ("several:test", ROWS[1:]),
        ("one[:50%]", ROWS[:1]),
    ):
        assert [r.fields for r in load_records(f"{tmp_path}/{name}")] == expected, name
    with pytest.raises(DataError, match="with the split 'dev'"):
        load_records(f"{tmp_path}/several:dev")
    with pytest.raises(DataError, match=r"one:test: expected .*/one, a dataset without splits, "):
        load_records(f"{tmp_path}/one:test")
    with pytest.raises(DataError, match=r"has no configurations, got 'config' too"):
        load_records(f"{tmp_path}/several:config:test")


def test_parts_of_text_are_the_text(tokenizer):
    parts = [{"type": "text", "text": "Rain in "}, {"type": "text", "text": "Oslo?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    found = trained(tokenizer, {"messages": [{"role": "user", "content": parts}, answer]})
    assert found == ("<user>Rain in Oslo?</s>\n<assistant>Yes.</s>", ["Yes.</s>"])


def test_tokens_are_no_text(tokenizer):
    with pytest.raises(DataError, match=r"expected text, got tokens \(input_ids\)"):
        load_text([TOKENS], tokenizer)
