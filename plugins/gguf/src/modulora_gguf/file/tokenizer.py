"""Build the tokenizer that a GGUF file describes; its token ids are llama.cpp's.

transformers has classes for the same vocabularies. They respell tokens beyond ASCII, add tokens
that a file lacks, and split text in other ways, so that we build the backend from the file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from modulora_core.errors import ModelError
from modulora_core.models.stops import STOP_TOKENS
from modulora_gguf.file.header import Header
from modulora_gguf.file.splits import LIKE_LLAMA_3, pre_tokenizer
from modulora_gguf.file.vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Tokens with a role in transformers, and the fields that name them."""

_OF_SENTENCEPIECE = {"unk_token": 0, "bos_token": 1, "eos_token": 2}
"""The ids in files that name none."""

_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's special tokens that don't take the white space behind them."""


def load_tokenizer(header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer of the file, whose vocabulary has the file's tokens and no others.

    Raises:
        ModelError: the file has no vocabulary, or a kind of vocabulary that isn't read.
    """
    from transformers import PreTrainedTokenizerFast

    kind = header.text("tokenizer.ggml.model", "")
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"tokenizer.ggml.model: expected gpt2 (byte-level BPE) or llama (SentencePiece), got "
            f"{kind!r:.40}"
        )
    vocabulary = read_vocabulary(header)
    named = named_tokens(header, vocabulary.tokens)
    if kind == "gpt2":
        backend = _byte_level(header, vocabulary)
    else:
        backend = _sentencepiece(header, vocabulary, named.get("unk_token"))
    backend.add_tokens(_added_tokens(header, vocabulary, set(named.values())))
    begins = kind == "llama" or _split_name(header) in LIKE_LLAMA_3
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=_flag(header, "add_bos_token", begins),
        add_eos_token=_flag(header, "add_eos_token", False),
        chat_template=header.text("tokenizer.chat_template", "") or None,
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.name_or_path = str(header.path)  # for messages
    return tokenizer


def named_tokens(header: Header, tokens: list[str]) -> dict[str, str]:
    """Tokens by their roles. As in llama.cpp, an id beyond the vocabulary counts as none."""
    is_llama = header.text("tokenizer.ggml.model", "") == "llama"
    ids: dict[str, Any] = dict(_OF_SENTENCEPIECE) if is_llama else {}
    for role, name in _NAMED.items():
        field = header.fields.get(f"tokenizer.ggml.{name}")
        if field is not None and type(field.value) is int and 0 <= field.value < len(tokens):
            ids[role] = field.value
    return {role: tokens[i] for role, i in ids.items() if i < len(tokens)}


def _split_name(header: Header) -> str:
    return header.text("tokenizer.ggml.pre", "")


def _flag(header: Header, name: str, default: bool) -> bool:
    field = header.fields.get(f"tokenizer.ggml.{name}")
    return default if field is None else bool(field.value)


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: i for i, token in enumerate(vocabulary.tokens)}


def _byte_level(header: Header, vocabulary: Vocabulary) -> Any:
    """A BPE over bytes, which its tokens spell as letters."""
    from tokenizers import Tokenizer, decoders, models

    name = _split_name(header)
    whole_words = name in LIKE_LLAMA_3
    model = models.BPE(_ids(vocabulary), vocabulary.merges, ignore_merges=whole_words)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(header.path, name)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: Header, vocabulary: Vocabulary, unknown: str | None) -> Any:
    """A BPE over letters that has ``▁`` for a space; other letters are bytes such as ``<0x0A>``.

    The better of two merges makes the token of the higher score; Gemma's scores don't tell, but the
    order of its tokens does.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    ids, merges = _ids(vocabulary), vocabulary.merges
    if not merges:
        by_place = header.architecture.startswith("gemma")
        scores = [-float(i) for i in ids.values()] if by_place else vocabulary.scores
        merges = generate_merges(ids, dict(zip(ids, scores, strict=False)))
    model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    prefix = _flag(header, "add_space_prefix", True)
    first: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last: list[Any] = [decoders.Strip(" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return backend


def _added_tokens(header: Header, vocabulary: Vocabulary, named: Collection[str]) -> list[Any]:
    """The tokens that are found in a text before it is split, with the marks that llama.cpp has.

    Control tokens are special: decoding may skip them. So are tokens that end an answer, whatever
    their types in the file.
    """
    from tokenizers import AddedToken

    name = header.text("general.name", "").lower()
    strips = "phi-3" in name or "phi3" in name
    found = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=False):
        special = kind in (CONTROL, UNKNOWN) or token in STOP_TOKENS or token in named
        if special or kind == USER_DEFINED:
            rstrip = strips and token not in _KEEP_SPACES
            found.append(AddedToken(token, normalized=False, special=special, rstrip=rstrip))
    return found
