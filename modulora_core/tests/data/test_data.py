from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from modulora_core.data import (
    Collator,
    instruction_prompt,
    load_examples,
    load_text,
    token_segments,
)
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import DataError, OptionError
from modulora_core.tests.markdown_blocks import blocks
from modulora_core.tests.tiny_tokenizer import make_tokenizer, smol_tokenizer, trained, write_jsonl

CHAT = [
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "One, of course."},
]


@pytest.fixture(scope="module")
def smol():
    return smol_tokenizer()


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture
def save(tmp_path):
    return lambda *rows: write_jsonl(tmp_path / "data.jsonl", *rows)


# ---------------------------------------------------------------------------------------- text, packed


def test_text_is_joined_by_eos_and_cut_into_windows(plain, save):
    texts = ["The first document.", "", "The second one.", "And a third."]
    examples = load_examples(save(*({"text": text} for text in texts)), plain, seq_len=7)
    ids = [token for example in examples for token in example["input_ids"]]
    whole = plain("</s>".join(text for text in texts if text))["input_ids"]
    # a last window of one token, which predicts nothing, is left out: whether there is one depends on the text that Python brings
    assert ids == (whole[:-1] if len(whole) % 7 == 1 else whole)
    assert plain.decode(whole) == "The first document.</s>The second one.</s>And a third."
    lengths = [len(example["input_ids"]) for example in examples]
    assert lengths[:-1] == [7] * (len(lengths) - 1)
    assert 1 < lengths[-1] <= 7
    assert all(example["labels"] == example["input_ids"] for example in examples)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_last_window_of_one_token_is_dropped(plain, save, left):
    ids = plain("word " * 40)["input_ids"][: 16 + left]
    examples = load_examples(save({"text": plain.decode(ids)}), plain, seq_len=8)
    assert [len(e["input_ids"]) for e in examples] == [8, 8] + [2] * (left == 2)
    assert examples.report.tokens == 16 + 2 * (left == 2)
    assert examples.report.trained_tokens == examples.report.tokens - len(examples)


# ----------------------------------------------------------------------------------- report and limits


def test_examples_longer_than_the_window_are_cut_counted_and_logged_once(plain, save, caplog):
    """The third one's answer begins beyond the window, and the fourth has none."""
    rows = [("a", "b"), ("a", "b " * 30), ("a " * 30, "b"), ("a", " ")]
    path = save(*({"prompt": prompt, "completion": completion} for prompt, completion in rows))
    with caplog.at_level(logging.WARNING):
        examples = load_examples(path, plain, seq_len=10)
    report = examples.report
    assert (report.format, report.templated, report.records) == ("completion", False, 4)
    assert (report.examples, report.truncated, report.dropped, report.blank) == (2, 1, 1, 1)
    assert report.tokens == sum(len(example["input_ids"]) for example in examples)
    assert report.trained_tokens == sum(
        label != -100 for example in examples for label in example["labels"][1:]
    )
    assert len(examples[1]["input_ids"]) == 10
    (record,) = caplog.records
    assert (
        "2 of 3 examples are longer than seq_len 10: 1 truncated, 1 dropped" in record.getMessage()
    )
    assert "1 of 4 records have an empty answer" in record.getMessage()


def test_nothing_left_to_train_on_is_refused(plain, save):
    with pytest.raises(
        DataError, match="answer starts within seq_len 5, got none of 1; raise seq_len"
    ):
        load_examples(save({"prompt": "a " * 30, "completion": "b"}), plain, seq_len=5)
    with pytest.raises(DataError, match="line 1: expected an answer to train on, got an empty one"):
        load_examples(save({"prompt": "a", "completion": ""}), plain, seq_len=5)
    with pytest.raises(DataError, match="expected a text of 2 tokens or more, got 0"):
        load_examples(save({"text": " \n"}), plain, seq_len=5)


SHAREGPT = [{"from": "human", "value": "Say one."}, {"from": "gpt", "value": "One, of course."}]
TEXT, CHOICE = {"text": "a"}, {"prompt": "a", "completion": "b"}
LISTED = [{"messages": [{"role": "user", "content": ["hi"]}]}]
UNUSABLE = [
    (
        [TEXT, CHOICE],
        "line 2: expected format text as in .*line 1, got completion; one run takes one format",
    ),
    (
        [{**TEXT, "instruction": "b", "output": "c"}],
        "line 1: .* those of text and instruct .* with --format",
    ),
    (
        [{"texts": "a", "n": 1}],
        "line 1: expected the fields text; or instruction, .*the fields 'n', 'texts'",
    ),
    ([{"text": None}], "line 1: expected the fields .*got no fields"),
    ([TEXT, {"text": 3}], "line 2: field 'text': expected a string, got 3"),
    (
        [{"instruction": "a", "output": "b", "input": 1}],
        "line 1: field 'input': expected a string, got 1",
    ),
    (
        [{**TEXT, "label": 0.5}],
        "line 1: field 'label': expected a string or a whole number, got 0.5",
    ),
    ([{"messages": []}], r"line 1: messages: expected a list of turns, got \[\]"),
    (
        [{"messages": ["hi"]}],
        "line 1: message 1: expected an object with role and content, got 'hi'",
    ),
    (LISTED, r"line 1: message 1: expected a string as its content, got \['hi'\]"),
    (
        [{"messages": CHAT[:1]}],
        "line 1: messages: expected a turn of the assistant .* got only user",
    ),
    (
        [{"conversations": SHAREGPT[:1]}],
        "line 1: conversations: expected a turn of the assistant .* only user",
    ),
    (
        [{"conversations": [{"from": "gpt"}]}],
        "line 1: message 1: expected a string as its value, got None",
    ),
    ([{"messages": CHAT}, {"text": "a"}], "line 2: expected format chat as in .*line 1, got text"),
]


@pytest.mark.parametrize(("rows", "message"), UNUSABLE)
def test_records_of_no_format_are_refused_with_their_line(plain, save, rows, message):
    with pytest.raises(DataError, match=message):
        load_examples(save(*rows), plain, seq_len=50)


@pytest.mark.parametrize(
    "begin", [[], [{"from": "system", "value": "Be brief."}]], ids=["", "system"]
)
def test_sharegpts_conversations_are_trained_like_messages(smol, save, begin):
    same = [{"role": turn["from"], "content": turn["value"]} for turn in begin] + CHAT
    of_sharegpt = load_examples(
        save({"conversations": begin + SHAREGPT, "id": "x"}), smol, seq_len=99
    )
    of_messages = load_examples(save({"messages": same}), smol, seq_len=99)
    assert of_sharegpt.report.format == "chat"
    assert of_sharegpt[0] == of_messages[0]


def test_messages_count_where_a_record_has_both_and_turns_may_have_either_form(smol, save):
    both = load_examples(save({"messages": CHAT, "conversations": SHAREGPT[:1]}), smol, seq_len=99)
    mixed = load_examples(save({"conversations": [SHAREGPT[0], CHAT[1]]}), smol, seq_len=99)
    assert both[0] == mixed[0] == load_examples(save({"messages": CHAT}), smol, seq_len=99)[0]


def test_a_csv_without_a_header_is_refused(plain, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("What is it?,A thing.\nAnd that?,Another.\n")
    with pytest.raises(
        DataError, match=r"d.csv, line 2: .*in a .csv file the first line names them.*'A thing.'"
    ):
        load_examples(path, plain, seq_len=50)


def test_a_format_that_is_asked_for_needs_its_fields_and_ignores_others(plain, save):
    path = save({"text": "a b", "instruction": "b", "output": "c"}, {"text": "d"})
    assert load_examples(path, plain, format="text", seq_len=50).report.format == "text"
    with pytest.raises(
        DataError, match="line 2: missing field 'instruction'; got the fields 'text'"
    ):
        load_examples(path, plain, format="instruct", seq_len=50)
    with pytest.raises(
        OptionError, match="format: expected auto, text, instruct, chat, completion, got 'alpaca'"
    ):
        load_examples(path, plain, format="alpaca", seq_len=50)
    with pytest.raises(OptionError, match="seq_len: expected at least 2 tokens, got 1"):
        load_examples(path, plain, seq_len=1)


# ----------------------------------------------------------------------------------------- the dataset


def test_the_dataset_is_indexed_from_both_ends_and_ends(plain, save):
    examples = load_examples(
        save(*({"prompt": "a", "completion": c} for c in "bcd")), plain, seq_len=9
    )
    assert [trained(plain, example) for example in examples] == ["b</s>", "c</s>", "d</s>"]
    assert examples[-1] == examples[2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            examples[index]


def test_a_batch_is_padded_to_its_longest_and_masked(plain, save):
    path = save({"prompt": "a", "completion": "b"}, {"prompt": "a b", "completion": "c d e"})
    examples = load_examples(path, plain, seq_len=50)
    (batch,) = DataLoader(examples, batch_size=2, collate_fn=Collator(pad_token_id=1))
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    short, long = (len(example["input_ids"]) for example in examples)
    assert short < long == batch["input_ids"].shape[1]
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row].tolist() == example["input_ids"] + [1] * (long - length)
        assert batch["labels"][row].tolist() == example["labels"] + [-100] * (long - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (long - length)


# ----------------------------------------------------------------------------------- text and segments


def test_load_text_joins_text_by_blank_lines_and_ignores_labels(save):
    """Empty records stay, as in the usual perplexity of WikiText."""
    assert load_text(save({"text": "a", "label": 1}, {"text": ""}, {"text": "b"})) == "a\n\n\n\nb"


def test_load_text_renders_other_records_as_they_are_trained(smol, plain, save):
    row = {"instruction": "Add.", "output": "It is 2."}
    path = save(row, {**row, "output": "It is 3."})
    prompt = instruction_prompt("Add.")
    assert load_text(path) == load_text(path, plain) == f"{prompt}It is 2.\n\n{prompt}It is 3."
    trained_text = [
        smol.decode(example["input_ids"]) for example in load_examples(path, smol, seq_len=99)
    ]
    assert load_text(path, smol) == "\n\n".join(trained_text)
    assert load_text(save({"messages": CHAT})) == "Say one.\n\nOne, of course."


def test_load_text_of_blank_records_is_refused(save):
    with pytest.raises(DataError, match="line 1: expected text, got only empty records"):
        load_text(save({"text": " "}, {"text": ""}))


@pytest.mark.parametrize("add_bos", [False, True])
def test_segments_are_consecutive_tokens_of_the_text_without_bos(tmp_path, add_bos, caplog):
    tokenizer = make_tokenizer(add_bos=add_bos)
    (tmp_path / "d.txt").write_text(pydoc_text()[:5000])
    with caplog.at_level(logging.WARNING, logger="transformers"):
        segments = token_segments(tmp_path / "d.txt", tokenizer, 64)
    assert not caplog.records  # the text is longer than model_max_length, and that is no news
    ids = tokenizer(pydoc_text()[:5000], add_special_tokens=False)["input_ids"]
    assert segments.dtype == torch.int64
    assert segments.shape == (len(ids) // 64, 64)
    assert segments.flatten().tolist() == ids[: segments.numel()]
    assert torch.equal(token_segments(tmp_path / "d.txt", tokenizer, 64, 3), segments[:3])


def test_a_seed_draws_segments_without_repeats_and_repeats_itself(plain):
    every = token_segments("pydoc[:5%]", plain, 64)
    drawn = token_segments("pydoc[:5%]", plain, 64, 10, seed=1)
    rows = [every.tolist().index(row) for row in drawn.tolist()]
    assert len(set(rows)) == 10
    assert rows != sorted(rows)
    assert torch.equal(drawn, token_segments("pydoc[:5%]", plain, 64, 10, seed=1))
    assert not torch.equal(drawn, token_segments("pydoc[:5%]", plain, 64, 10, seed=2))


def test_too_short_a_text_is_refused_with_its_length(plain, tmp_path):
    (tmp_path / "d.txt").write_text("a b c")
    count = len(plain("a b c")["input_ids"])
    with pytest.raises(
        DataError, match=f"d.txt: expected at least seq_len 64 tokens, got {count};"
    ):
        token_segments(tmp_path / "d.txt", plain, 64)
    with pytest.raises(OptionError, match="segments: expected at least 1, got 0"):
        token_segments("pydoc", plain, 64, 0)


# --------------------------------------------------------------------------------------------- the docs

DOCUMENTED = {
    "texts.jsonl": "text",
    "instructions.jsonl": "instruct",
    "chats.jsonl": "chat",
    "sharegpt.jsonl": "chat",
    "completions.jsonl": "completion",
    "labels.jsonl": "completion",
}


def test_the_records_of_the_docs_have_the_formats_that_they_show(smol, tmp_path):
    page = Path(__file__).parents[3] / "docs" / "how-to" / "training-data.md"
    shown = {block.title: block.text for block in blocks(page, "json")}
    assert shown.keys() == DOCUMENTED.keys()
    for name, text in shown.items():
        (tmp_path / name).write_text(text, "utf-8")
        report = load_examples(tmp_path / name, smol, seq_len=99).report
        assert (report.format, report.examples) == (DOCUMENTED[name], 1), name
