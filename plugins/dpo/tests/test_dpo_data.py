"""Preference data: its spellings, its rows for TRL, and refused records."""

import pytest
from modulora_dpo.preferences import load_preferences

from modulora_core.errors import DataError
from modulora_core.tests.tiny_tokenizer import make_tokenizer, write_jsonl

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


PLAIN = {"prompt": "Who?", "chosen": "me", "rejected": "you"}
CHAT = {
    "prompt": turns("Who?"),
    "chosen": [{"role": "assistant", "content": "me"}],
    "rejected": [{"role": "assistant", "content": "you"}],
}
SPELLINGS = {
    "strings": PLAIN,
    "messages": CHAT,
    "a string and messages": {**CHAT, "prompt": "Who?"},
    "messages and strings": {**PLAIN, "prompt": turns("Who?")},
    "whole chats": {"chosen": turns("Who?", "me"), "rejected": turns("Who?", "you")},
    "whole chats with a prompt": {
        "prompt": "Who?", "chosen": turns("Who?", "me"), "rejected": turns("Who?", "you"),
    },
}  # fmt: skip


def rows(tmp_path, *records, template=TEMPLATE):
    file = write_jsonl(tmp_path / "data.jsonl", *records)
    return load_preferences(file, make_tokenizer(template=template), seq_len=16)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_the_same_messages(tmp_path, spelling):
    assert rows(tmp_path, SPELLINGS[spelling]) == [CHAT]


def test_without_a_chat_template_strings_stay_strings(tmp_path):
    assert rows(tmp_path, PLAIN, template=None) == [PLAIN]
    with pytest.raises(DataError, match="line 1: a chat needs a chat template"):
        rows(tmp_path, CHAT, template=None)


def test_a_prompt_that_fills_the_window_is_left_out(tmp_path, caplog):
    long = {**PLAIN, "prompt": "why so long " * 20}
    assert rows(tmp_path, long, PLAIN) == [CHAT]
    assert "1 of 2 records are left out because their prompt alone has seq_len 16" in caplog.text
    with pytest.raises(DataError, match="expected prompts of fewer than seq_len 16 tokens"):
        rows(tmp_path, long)


WRONG = {
    "line 1: got no rejected": {"prompt": "a", "chosen": "b"},
    "line 1: expected a prompt": {"chosen": "a", "rejected": "b"},
    "line 1: chosen: expected a string, or a list .*; preferences: ": {**PLAIN, "chosen": 1},
    "line 1: .*dpo reads none": {**PLAIN, "tools": [{"type": "function"}]},
    "line 1: chosen: expected one turn of the assistant after the prompt, got user": {
        **CHAT, "chosen": turns("no"),
    },
    "line 1: rejected: expected one turn of the assistant .*, got assistant, user, assistant": {
        **CHAT, "rejected": [*CHAT["rejected"], *turns("a", "b")],
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_record_is_refused_with_its_place(tmp_path, message):
    with pytest.raises(
        DataError, match=f"data.jsonl, line 1: .*{message.removeprefix('line 1: ')}"
    ):
        rows(tmp_path, WRONG[message])


def test_a_token_of_an_answer_that_the_model_lacks_is_refused(tmp_path):
    tokenizer = make_tokenizer(template=TEMPLATE)
    known = len(tokenizer)
    tokenizer.add_tokens(["nobody"])
    for name in ("prompt", "chosen", "rejected"):
        file = write_jsonl(tmp_path / "data.jsonl", {**PLAIN, name: "nobody"})
        with pytest.raises(DataError, match=rf"line 1: expected token ids below .* got {known} "):
            load_preferences(file, tokenizer, seq_len=16, vocabulary=known)
