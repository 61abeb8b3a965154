from __future__ import annotations

import pytest

from modulora_core.data import instruction_prompt, load_examples
from modulora_core.errors import DataError
from modulora_core.tests.tiny_tokenizer import make_tokenizer, smol_tokenizer, trained, write_jsonl

CHAT = [
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "One, of course."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Two.\n\nThere."},
    {"role": "user", "content": "Bye"},
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


def assert_labels_are_the_ids(example):
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    assert all(label in (-100, token) for token, label in pairs)


# -------------------------------------------------------------------------------------- chat templates


def test_a_chat_trains_all_turns_of_the_assistant_and_nothing_else(smol, save):
    example = load_examples(save({"messages": CHAT}), smol, seq_len=200)[0]
    assert trained(smol, example) == "One, of course.<|im_end|>Two.\n\nThere.<|im_end|>"
    assert_labels_are_the_ids(example)


def test_a_chat_is_tokenized_as_the_template_renders_it(smol, save):
    """Up to the end of the last answer; what follows it is not read by any trained token."""
    ids = load_examples(save({"messages": CHAT}), smol, seq_len=200)[0]["input_ids"]
    rendered = smol.apply_chat_template(CHAT[:4], tokenize=False)
    assert ids == smol(rendered.removesuffix("\n"), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Add.", "input": "1 + 1", "output": "It is 2."}, "Add.\n\n1 + 1"),
        ({"instruction": "Add 1 + 1.", "input": "", "output": "It is 2."}, "Add 1 + 1."),
        ({"instruction": "Add 1 + 1.", "input": None, "output": "It is 2."}, "Add 1 + 1."),
        ({"prompt": "Add 1 + 1.", "completion": "It is 2."}, "Add 1 + 1."),
        ({"text": "Add 1 + 1.", "label": "It is 2."}, "Add 1 + 1."),
    ],
)
def test_with_a_template_an_answer_is_trained_after_the_tokens_that_a_chat_asks_with(
    smol, save, row, question
):
    example = load_examples(save(row), smol, seq_len=100)[0]
    asked = smol.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    assert example["input_ids"][: len(asked)] == asked
    assert example["labels"][: len(asked)] == [-100] * len(asked)
    assert smol.decode(example["labels"][len(asked) :]) == "It is 2.<|im_end|>"


REWRITING = (  # keeps the reasoning of the last turn only, as the templates of reasoning models do
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(save):
    tokenizer = make_tokenizer(template=REWRITING)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>b</think>c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "<think>e</think>f"},
    ]
    examples = load_examples(save({"messages": turns}), tokenizer, seq_len=200)
    assert [tokenizer.decode(e["input_ids"]) for e in examples] == [
        "<user>a</s><assistant><think>b</think>c</s>",
        "<user>a</s><assistant>c</s><user>d</s><assistant><think>e</think>f</s>",
    ]
    assert [trained(tokenizer, e) for e in examples] == [
        "<think>b</think>c</s>",
        "<think>e</think>f</s>",
    ]


def test_a_template_that_does_not_continue_its_prompt_is_refused(save):
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}GO{% endif %}"
    path = save({"prompt": "a", "completion": "b"})
    with pytest.raises(
        DataError, match=r"line 1: message 2: .* doesn't continue its own prompt.*'a</s>GO'"
    ):
        load_examples(path, make_tokenizer(template=template), seq_len=20)


def test_a_template_that_refuses_a_conversation_is_quoted_with_the_line(save):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    )
    rows = [{"messages": [{"role": "system", "content": "s"}, *CHAT]}]
    with pytest.raises(
        DataError, match=r"line 1: .*template refuses turns of system, user: no system here"
    ):
        load_examples(save(*rows), make_tokenizer(template=template), seq_len=20)


def test_a_chat_without_a_template_is_refused_and_says_what_to_do(plain, save):
    with pytest.raises(
        DataError, match=r"line 1: a chat needs a chat template.*put a chat_template.jinja beside"
    ):
        load_examples(save({"messages": CHAT}), plain, seq_len=100)


# ---------------------------------------------------------------------------------- without a template


@pytest.mark.parametrize("input", ["", "1 + 1"])
def test_without_a_template_an_instruction_is_asked_with_alpacas_prompt(plain, save, input):
    row = {"instruction": "Add.", "input": input, "output": "It is 2."}
    example = load_examples(save(row), plain, seq_len=500)[0]
    assert plain.decode(example["input_ids"]) == instruction_prompt("Add.", input) + "It is 2.</s>"
    assert trained(plain, example) == "It is 2.</s>"


def test_alpacas_prompt_is_the_published_one():
    assert instruction_prompt("Add.", "1 + 1") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n"
    )
    assert instruction_prompt("Add.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


@pytest.mark.parametrize("prompt", ["The parameter", "The parameter ", "The para", ""])
def test_a_prompt_has_the_tokens_that_it_has_alone(plain, save, prompt):
    """Also where the tokenizer would merge characters across the border, as in 'para' + 'meter'."""
    asked = plain(prompt)["input_ids"]
    merges = plain(prompt + "meter is")["input_ids"][: len(asked)] != asked
    assert merges == (prompt in ("The parameter ", "The para"))  # or this tests less than it says
    example = load_examples(save({"prompt": prompt, "completion": "meter is"}), plain, seq_len=50)[
        0
    ]
    assert example["input_ids"][: len(asked)] == asked
    assert plain.decode(example["input_ids"]) == prompt + "meter is</s>"
    assert trained(plain, example) == "meter is</s>"


def test_a_label_is_trained_after_the_word_label(plain, save):
    examples = load_examples(save({"text": "Good.", "label": 1}), plain, seq_len=50)
    assert plain.decode(examples[0]["input_ids"]) == "Good.\nLabel: 1</s>"
    assert trained(plain, examples[0]) == " 1</s>"
    assert examples.report.format == "completion"


def test_bos_goes_in_front_where_the_tokenizer_uses_it(save):
    tokenizer = make_tokenizer(add_bos=True)
    ids = load_examples(save({"prompt": "The", "completion": " end"}), tokenizer, seq_len=50)[0][
        "input_ids"
    ]
    assert ids[: len(tokenizer("The")["input_ids"])] == tokenizer("The")["input_ids"]
    assert tokenizer.decode(ids) == "<s>The end</s>"


def test_a_tokenizer_that_prepends_a_space_gets_none_between_prompt_and_answer(save):
    tokenizer = make_tokenizer(metaspace=True)
    ids = load_examples(save({"prompt": "The", "completion": " end"}), tokenizer, seq_len=50)[0][
        "input_ids"
    ]
    assert ids == tokenizer("The end")["input_ids"] + [tokenizer.eos_token_id]


def test_an_answer_that_no_token_can_close_is_refused(save):
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_examples(
            save({"prompt": "a", "completion": "b"}), make_tokenizer(eos=None), seq_len=50
        )
