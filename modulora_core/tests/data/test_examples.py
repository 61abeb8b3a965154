"""Records become examples of at most seq_len tokens; others are refused with their line."""

import logging

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
from modulora_core.tests.tiny_tokenizer import make_tokenizer

CHAT = [
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "One, of course."},
]
SHAREGPT = [{"from": "human", "value": "Say one."}, {"from": "gpt", "value": "One, of course."}]


def test_text_is_joined_by_eos_and_cut_into_windows(plain, save):
    texts = ["The first document.", "", "The second one.", "And a third."]
    examples = load_examples(save(*({"text": text} for text in texts)), plain, seq_len=7)
    ids = [token for example in examples for token in example["input_ids"]]
    whole = plain("</s>".join(text for text in texts if text))["input_ids"]
    # a last window of one token predicts nothing
    assert ids == (whole[:-1] if len(whole) % 7 == 1 else whole)
    assert plain.decode(whole) == "The first document.</s>The second one.</s>And a third."
    assert {len(example["input_ids"]) for example in list(examples)[:-1]} == {7}
    assert all(example["labels"] == example["input_ids"] for example in examples)


def test_examples_longer_than_the_window_are_cut_counted_and_logged_once(plain, save, caplog):
    rows = [("a", "b"), ("a", "b " * 30), ("a " * 30, "b"), ("a", " ")]  # fits, cut, dropped, blank
    path = save(*({"prompt": prompt, "completion": completion} for prompt, completion in rows))
    with caplog.at_level(logging.WARNING):
        examples = load_examples(path, plain, seq_len=10)
    report = examples.report
    assert (report.format, report.templated, report.records) == ("completion", False, 4)
    assert (report.examples, report.truncated, report.dropped, report.blank) == (2, 1, 1, 1)
    assert report.tokens == sum(len(example["input_ids"]) for example in examples)
    labels = [label for example in examples for label in example["labels"][1:]]
    assert report.trained_tokens == sum(label != -100 for label in labels)
    assert len(examples[1]["input_ids"]) == 10
    (record,) = caplog.records
    told = "2 of 3 examples are longer than seq_len 10: 1 truncated, 1 dropped"
    assert told in record.getMessage()
    whole = load_examples(path, plain, seq_len=200).report.tokens
    assert f"{1 - report.tokens / whole:.1%} of all tokens are lost" in record.getMessage()
    assert "1 of 4 records have an empty answer" in record.getMessage()


UNUSABLE = [
    (
        [{"prompt": "a " * 30, "completion": "b"}],
        "starts within seq_len 9, got none of 1; raise seq_l",
    ),
    (
        [{"prompt": "a", "completion": ""}],
        "line 1: expected an answer to train on, got an empty one",
    ),
    ([{"text": " \n"}], "expected a text of 2 tokens or more, got 0"),
    (
        [{"text": "a"}, {"prompt": "a", "completion": "b"}],
        "line 2: text: Field required, got {'prompt",
    ),
    (
        [{"text": "a", "instruction": "b", "output": "c"}],
        "those of text and instruct .* with --format",
    ),
    ([{"text": None}], "line 1: expected the fields .*got no fields"),
    ([{"text": "a", "label": 0.5}], "expected a string or a whole number, got 0.5"),
    (
        [{"text": "a", "label": 1}, {"text": "b", "label": None}],
        r"line 2: label: expected a label in every row \(.*\), got None",
    ),
    ([{"messages": ["hi"]}], "messages: 0: expected a valid dictionary, got 'hi'"),
    ([{"messages": [{"role": "user", "content": ["hi"]}]}], "parts of type text, .*got 'hi'"),
    ([{"messages": CHAT[:1]}], "expected a turn of the assistant .* got only user"),
    (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        "got chosen and rejected; `modulora dpo` trains on them",
    ),
    ([{"input_ids": [5, 6], "labels": [-100, -100]}], "expected a token to train .* none in 1"),
]


@pytest.mark.parametrize(("rows", "message"), UNUSABLE)
def test_unusable_records_are_refused_with_their_line(plain, save, rows, message):
    with pytest.raises(DataError, match=message):
        load_examples(save(*rows), plain, seq_len=9)


def test_sharegpts_conversations_are_trained_like_messages(smol, save):
    expected = load_examples(save({"messages": CHAT}), smol, seq_len=99)[0]
    for record in (
        {"conversations": SHAREGPT, "id": "x"},
        {"messages": CHAT, "conversations": SHAREGPT[:1]},  # messages count
        {"conversations": [SHAREGPT[0], CHAT[1]]},
    ):
        examples = load_examples(save(record), smol, seq_len=99)
        assert examples.report.format == "chat"
        assert examples[0] == expected
    system = {"from": "system", "value": "Be brief."}, {"role": "system", "content": "Be brief."}
    ours, theirs = {"conversations": [system[0], *SHAREGPT]}, {"messages": [system[1], *CHAT]}
    one, other = (load_examples(save(record), smol, seq_len=99)[0] for record in (ours, theirs))
    assert one == other != expected


def test_a_format_that_is_asked_for_needs_its_fields_and_ignores_others(plain, save):
    path = save({"text": "a b", "instruction": "b", "output": "c"}, {"text": "d"})
    assert load_examples(path, plain, format="text", seq_len=50).report.format == "text"
    with pytest.raises(DataError, match=r"line 2: instruction: Field required, got"):
        load_examples(path, plain, format="instruct", seq_len=50)
    with pytest.raises(OptionError, match=r"format: expected auto, text, .*got 'alpaca'"):
        load_examples(path, plain, format="alpaca", seq_len=50)
    with pytest.raises(OptionError, match="seq_len: expected at least 2 tokens, got 1"):
        load_examples(path, plain, seq_len=1)


def test_a_batch_is_padded_to_its_longest_and_masked(plain, save):
    path = save({"prompt": "a", "completion": "b"}, {"prompt": "a b", "completion": "c d e"})
    examples = load_examples(path, plain, seq_len=50)
    (batch,) = DataLoader(examples, batch_size=2, collate_fn=Collator(pad_token_id=1))
    longest = max(len(example["input_ids"]) for example in examples)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        for name, padding in (("input_ids", 1), ("labels", -100)):
            assert batch[name].dtype == torch.int64
            assert batch[name][row].tolist() == example[name] + [padding] * (longest - length)
        mask = [1] * length + [0] * (longest - length)
        assert batch["attention_mask"][row].tolist() == mask


# --- text and segments


def test_load_text_joins_text_by_blank_lines_and_ignores_labels(save):
    """Empty records stay, as in the usual perplexity of WikiText."""
    assert load_text(save({"text": "a", "label": 1}, {"text": ""}, {"text": "b"})) == "a\n\n\n\nb"
    with pytest.raises(DataError, match="line 1: expected text, got only empty records"):
        load_text(save({"text": " "}, {"text": ""}))


def test_load_text_renders_other_records_as_they_are_trained(smol, plain, save):
    row = {"instruction": "Add.", "output": "It is 2."}
    path = save(row, {**row, "output": "It is 3."})
    prompt = instruction_prompt("Add.")
    assert load_text(path) == load_text(path, plain) == f"{prompt}It is 2.\n\n{prompt}It is 3."
    examples = load_examples(path, smol, seq_len=99)
    expected = "\n\n".join(smol.decode(example["input_ids"]) for example in examples)
    assert load_text(path, smol) == expected
    assert load_text(save({"messages": CHAT})) == "Say one.\n\nOne, of course."


@pytest.mark.parametrize("add_bos", [False, True])
def test_segments_are_consecutive_tokens_of_the_text_without_bos(tmp_path, add_bos, caplog):
    tokenizer = make_tokenizer(add_bos=add_bos)
    (tmp_path / "d.txt").write_text(pydoc_text()[:5000])
    with caplog.at_level(logging.WARNING, logger="transformers"):
        segments = token_segments(tmp_path / "d.txt", tokenizer, 64)
    assert not caplog.records, "a text longer than model_max_length is no news"
    ids = tokenizer(pydoc_text()[:5000], add_special_tokens=False)["input_ids"]
    assert segments.dtype == torch.int64
    assert segments.shape == (len(ids) // 64, 64)
    assert segments.flatten().tolist() == ids[: segments.numel()]
    assert torch.equal(token_segments(tmp_path / "d.txt", tokenizer, 64, 3), segments[:3])


def test_too_short_a_text_is_refused_with_its_length(plain, tmp_path):
    (tmp_path / "d.txt").write_text("a b c")
    count = len(plain("a b c")["input_ids"])
    with pytest.raises(DataError, match=f"d.txt: .* at least seq_len 64 tokens, got {count};"):
        token_segments(tmp_path / "d.txt", plain, 64)
    with pytest.raises(OptionError, match="segments: expected at least 1, got 0"):
        token_segments("pydoc", plain, 64, 0)


# --- the docs
