"""A conversation has the tokens that the model is asked with, and only answers are trained."""

import pytest

from modulora_core.data import instruction_prompt, load_examples
from modulora_core.errors import DataError
from modulora_core.tests.tiny_tokenizer import make_tokenizer, trained

CHAT = [
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "One, of course."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Two.\n\nThere."},
    {"role": "user", "content": "Bye"},
]
PAIR = {"prompt": "The", "completion": " end"}


def example(path, tokenizer):
    return load_examples(path, tokenizer, seq_len=500)[0]


def test_a_chat_trains_all_turns_of_the_assistant_and_nothing_else(smol, save):
    """Its tokens are the template's, up to the end of the last answer."""
    found = example(save({"messages": CHAT}), smol)
    assert trained(smol, found) == "One, of course.<|im_end|>Two.\n\nThere.<|im_end|>"
    pairs = zip(found["input_ids"], found["labels"], strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    rendered = smol.apply_chat_template(CHAT[:4], tokenize=False).removesuffix("\n")
    assert found["input_ids"] == smol(rendered, add_special_tokens=False)["input_ids"]


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
def test_with_a_template_an_answer_follows_the_prompt_of_a_chat(smol, save, row, question):
    found = example(save(row), smol)
    turns = [{"role": "user", "content": question}]
    asked = smol.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert found["input_ids"][: len(asked)] == asked
    assert found["labels"][: len(asked)] == [-100] * len(asked)
    assert smol.decode(found["labels"][len(asked) :]) == "It is 2.<|im_end|>"


REWRITING = (  # keeps the reasoning of the last turn only, as the templates of reasoning models do
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(save):
    tokenizer = make_tokenizer(template=REWRITING)
    contents = ("a", "<think>b</think>c", "d", "<think>e</think>f")
    roles = ("user", "assistant") * 2
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    examples = load_examples(save({"messages": turns}), tokenizer, seq_len=200)
    assert [tokenizer.decode(found["input_ids"]) for found in examples] == [
        "<user>a</s><assistant><think>b</think>c</s>",
        "<user>a</s><assistant>c</s><user>d</s><assistant><think>e</think>f</s>",
    ]
    answers = ["<think>b</think>c</s>", "<think>e</think>f</s>"]
    assert [trained(tokenizer, found) for found in examples] == answers


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}GO{% endif %}",
            {"prompt": "a", "completion": "b"},
            r"line 1: message 2: .* doesn't continue its own prompt.*'a</s>GO'",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x",
            {"messages": [{"role": "system", "content": "s"}, *CHAT]},
            r"line 1: .*template refuses turns of system, user, assistant: no",
        ),
        (
            None,
            {"messages": CHAT},
            r"a chat needs a chat template.*put a chat_template.jinja beside",
        ),
    ],
)
def test_a_chat_that_the_template_cannot_render_is_refused(save, template, record, message):
    with pytest.raises(DataError, match=message):
        example(save(record), make_tokenizer(template=template))


def test_alpacas_prompt_is_the_published_one():
    paired = ", paired with an input that provides further context"
    for input, shown, more in (("1 + 1", "### Input:\n1 + 1\n\n", paired), ("", "", "")):
        assert instruction_prompt("Add.", input) == (
            f"Below is an instruction that describes a task{more}. Write a response that "
            "appropriately completes the request.\n\n"
            f"### Instruction:\nAdd.\n\n{shown}### Response:\n"
        )


@pytest.mark.parametrize("prompt", ["The parameter", "The parameter ", "The para", ""])
def test_a_prompt_has_the_tokens_that_it_has_alone(plain, save, prompt):
    """Also if the tokenizer would merge characters across the border, as in 'para' + 'meter'."""
    asked = plain(prompt)["input_ids"]
    merges = plain(prompt + "meter is")["input_ids"][: len(asked)] != asked
    assert merges == (prompt in ("The parameter ", "The para")), "or the test shows less"
    found = example(save({"prompt": prompt, "completion": "meter is"}), plain)
    assert found["input_ids"][: len(asked)] == asked
    assert plain.decode(found["input_ids"]) == prompt + "meter is</s>"
    assert trained(plain, found) == "meter is</s>"


def test_special_tokens_and_spaces_are_the_tokenizers(save):
    with_bos = make_tokenizer(add_bos=True)
    ids = example(save(PAIR), with_bos)["input_ids"]
    assert with_bos.decode(ids) == "<s>The end</s>"
    spaced = make_tokenizer(metaspace=True)  # prepends a space to a text
    ids = example(save(PAIR), spaced)["input_ids"]
    assert ids == [*spaced("The end")["input_ids"], spaced.eos_token_id]
    with pytest.raises(DataError, match="no end-of-sequence token"):
        example(save(PAIR), make_tokenizer(eos=None))
