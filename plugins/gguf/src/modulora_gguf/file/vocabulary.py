"""The vocabulary in the metadata of a GGUF file: tokens, their types and scores, and merges.

:mod:`modulora_gguf.file.header` walks over these arrays; they are read here on request.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

from modulora_core.errors import ModelError
from modulora_gguf.file.header import ARRAY, SCALARS, STRING, Header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""The types of tokens in llama.cpp that the tokenizer distinguishes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A token's id is its place in each list.

    Attributes:
        tokens: the spelling of each token in the file.
        types: llama.cpp's type of each token.
        scores: of each token; empty if the file has none.
        merges: pairs of tokens, the first one to merge first; empty if the file has none.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]


def read_vocabulary(header: Header) -> Vocabulary:
    """Read the vocabulary of a file. Raises ModelError: there is none, or its arrays don't fit."""
    tokens = _array(header, "tokens")
    if not tokens:
        raise ModelError("tokenizer.ggml.tokens: expected a vocabulary, got none")
    # llama.cpp's name of a token without letters, which nothing matches
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        ((twice, _),) = Counter(tokens).most_common(1)
        raise ModelError(f"tokenizer.ggml.tokens: expected each token once, got {twice!r} twice")
    types = _array(header, "token_type") or [NORMAL] * len(tokens)
    scores = _array(header, "scores")
    for name, found in (("token_type", types), ("scores", scores)):
        if found and len(found) < len(tokens):
            raise ModelError(
                f"tokenizer.ggml.{name}: expected one for each of {len(tokens)} tokens, got "
                f"{len(found)}"
            )
    return Vocabulary(tokens, types, scores, [_pair(one) for one in _array(header, "merges")])


def _pair(merge: str) -> tuple[str, str]:
    """Both parts of a merge; the first one may begin with a space."""
    border = merge.find(" ", 1)
    return merge[:border], merge[border + 1 :]


def _array(header: Header, name: str) -> list[Any]:
    """The elements of ``tokenizer.ggml.<name>``; empty if the file has no such array.

    Raises:
        ModelError: it is no array, or a string isn't UTF-8.
    """
    field = header.fields.get(f"tokenizer.ggml.{name}")
    if field is None:
        return []
    if field.kind != ARRAY:
        raise ModelError(f"tokenizer.ggml.{name}: expected an array, got type {field.kind}")
    with header.path.open("rb") as file:
        file.seek(field.start)
        data = file.read(field.stop - field.start)
    at = 8 + len(f"tokenizer.ggml.{name}") + 4  # length and bytes of the name, the type
    of, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if of != STRING:
        return list(struct.unpack_from(f"<{count}{SCALARS[of]}", data, at))
    found = []
    for i in range(count):
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        try:
            found.append(data[at - length : at].decode())
        except UnicodeDecodeError:
            raise ModelError(f"tokenizer.ggml.{name}: expected UTF-8 in element {i}") from None
    return found
