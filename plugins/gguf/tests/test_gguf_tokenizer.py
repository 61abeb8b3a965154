"""Tokenizers of GGUF files: llama.cpp's metadata, of which transformers leaves out a part."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from modulora_gguf.file.header import STRING, Field, Header
from modulora_gguf.file.tokenizer import set_splits, tokenizer_options
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from modulora_core.errors import ModelError


class Fast:
    """A fast tokenizer whose tokens are bytes, but for one whole word that no merge makes."""

    def __init__(self, letters: str = "Ġ▁ĊHIVE12abc!,本'") -> None:
        vocabulary = {letter: i for i, letter in enumerate([*letters, "abc"])}
        self.backend_tokenizer = Tokenizer(BPE(vocabulary, []))
        self.backend_tokenizer.decoder = decoders.ByteLevel()


def header(model: str, **fields: Any) -> Header:
    texts = {"general.architecture": "llama", "tokenizer.ggml.model": model}
    values = texts | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    found = {name: Field(STRING, value, 0, 0) for name, value in values.items()}
    return Header(3, found, (), 32, 0)


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("smollm", "I'VE 12345!", ["I", "'", "VE", "Ġ", "1", "2", "3", "4", "5", "!"]),
        ("stablelm2", "I'VE 12345!", ["I", "'VE", "Ġ", "1", "2", "3", "4", "5", "!"]),
        ("falcon", "a $12345!", ["a", "Ġ", "$", "123", "45", "!"]),
        ("default", "a $12345!", ["a", "Ġ", "$", "123", "45", "!"]),
        ("deepseek-llm", "I a,本 12\n", ["I", "Ġa", ",", "æľ¬", "Ġ", "12", "Ċ"]),
        ("deepseek-v3", "12345.a  b\n", ["123", "45", ".a", "Ġ", "Ġb", "Ċ"]),
        ("bloom", "a1b2 c, d", ["a1b2", "Ġc", ",", "Ġd"]),
    ],
)
def test_text_is_split_as_the_name_says(name: str, text: str, pieces: list[str]) -> None:
    fast = Fast()
    set_splits(fast, Path("a.gguf"), header("gpt2", pre=name))
    found = fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


def test_an_unknown_name_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        set_splits(Fast(), Path("unknown.gguf"), header("gpt2", pre="new-2027"))
        set_splits(Fast(), Path("old.gguf"), header("gpt2"))
    assert (
        "unknown.gguf: expected a known name in tokenizer.ggml.pre, got 'new-2027'" in caplog.text
    )
    assert "old.gguf: expected a known name in tokenizer.ggml.pre, got none" in caplog.text


def test_llama_3_has_whole_words_and_a_first_token() -> None:
    fast, described = Fast(), header("gpt2", pre="llama-bpe")
    set_splits(fast, Path("a.gguf"), described)
    assert fast.backend_tokenizer.encode("abc").tokens == ["abc"]
    assert tokenizer_options(described) == {"add_bos_token": True}
    assert tokenizer_options(header("gpt2", pre="llama-bpe", add_bos_token=False)) == {}
    assert tokenizer_options(header("gpt2", pre="qwen2")) == {}


def test_a_vocabulary_of_t5_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tokenizer.ggml.model: expected another than t5"):
        tokenizer_options(header("t5"))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_keeps_all_spaces(prefix: bool) -> None:
    fast = Fast()
    set_splits(fast, Path("a.gguf"), header("llama", add_space_prefix=prefix))
    tokens = fast.backend_tokenizer.encode("  a b").tokens
    assert "".join(tokens) == ("▁" if prefix else "") + "▁▁a▁b"
