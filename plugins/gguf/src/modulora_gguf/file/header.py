"""Parse the header of a GGUF file: its metadata, and the place of each tensor.

::

    "GGUF"  version  tensors  fields             uint32, uint64, uint64, little-endian
    each field     name, kind, value             an array has a kind, a count, and elements
    each tensor    name, dims, type, offset      dims from the last to the first
    data           begins at the next multiple of general.alignment

llama.cpp splits a large model into files ``NAME-00001-of-00003.gguf``, ... Each has a header of its
own tensors, and the first one has the metadata.

The ``gguf`` package makes two arrays of every token of a vocabulary, which takes seconds. This
parser walks over them, and checks every count and place against the size of the file.
"""

from __future__ import annotations

import importlib.metadata
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from modulora_core.errors import CheckpointError, ModelError

STRING, ARRAY = 8, 9
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MAX_DIMS, _MAX_PARTS = 4, 99_999
_REMOVED = frozenset((4, 5, 31, 32, 33, 36, 37, 38))
"""Numbers of types that llama.cpp had, such as Q4_2 and Q4_0_4_4."""

_MOST_TYPES = 256
"""A larger number isn't a newer type: the file is damaged."""

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_MOST_FIELDS, _MOST_TENSORS = 4096, 100_000
_MOST_TOKENS = 2**19
"""The longest array of a vocabulary; Gemma 3 has 262,144 tokens, and 514,906 merges."""

_MOST_ELEMENTS = 65536
"""Of all other arrays together: libraries take some 50 µs for each."""

_VOCABULARY = frozenset(
    f"tokenizer.ggml.{name}"
    for name in ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
)
_MAX_NUMBERS = 65536
"""Longer arrays of numbers, such as scores of tokens, are known by their length only."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the metadata.

    Attributes:
        kind: GGUF's number of the value's type.
        value: a number, a string, or a list of numbers; of another array its length.
        start, stop: its bytes in the file, with its name.
    """

    kind: int
    value: Any
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: ``kind`` is its type's name, ``shape`` is in torch's order, ``offset`` is of its
    first byte in the file ``path``."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file; ``data`` is the offset of the first tensor's data. A split model
    has the tensors of all its files."""

    version: int
    fields: Mapping[str, Field]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data: int

    def text(self, name: str, default: str | None = None) -> str:
        """A field that must be a string. Raises CheckpointError."""
        field = self.fields.get(name)
        if field is None and default is not None:
            return default
        if field is None or not isinstance(field.value, str):
            got = "none" if field is None else f"a value of type {field.kind}"
            raise CheckpointError(f"{name}: expected a string in the metadata, got {got}")
        return field.value


def read_header(path: Path) -> Header:
    """Parse the header of ``path``, and of the other parts of a split model, which lie beside it.

    Raises:
        CheckpointError: it isn't a GGUF file, or it is truncated or damaged, or a part is missing.
        ModelError: a tensor has a type that the installed gguf package doesn't know.
    """
    first = _read_part(path)
    number, count = _number_and_count(path, first)
    if count in (0, 1):
        return first
    name = _PART.fullmatch(path.name)
    if name is None or number != 0 or (int(name[2]), int(name[3])) != (1, count):
        raise CheckpointError(
            f"{path}: expected the first of {count} parts, NAME-00001-of-{count:05d}.gguf, got "
            f"part {number + 1} in a file of this name"
        )
    tensors = list(first.tensors)
    for i in range(1, count):
        other = path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf")
        if not other.is_file():
            raise CheckpointError(
                f"{path}: expected all its {count} parts in this folder, got no {other.name}; "
                "download it too"
            )
        part = _read_part(other)
        if _number_and_count(other, part) != (i, count):
            raise CheckpointError(f"{other}: expected part {i + 1} of {count}, got another one")
        tensors += part.tensors
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise CheckpointError(f"{path}: two of its parts have a tensor of one name")
    return replace(first, tensors=tuple(tensors))


def _number_and_count(path: Path, header: Header) -> tuple[int, int]:
    """The number of this part, from 0, and of all; ``(0, 0)`` for a model in one file."""
    fields = (header.fields.get(name) for name in ("split.no", "split.count"))
    number, count = (0 if field is None else field.value for field in fields)
    if type(number) is not int or type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: split.count: expected a number of files, got {count!r:.40}")
    return number, count


def _read_part(path: Path) -> Header:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).header()
    except (ValueError, OSError, CheckpointError) as error:  # mmap refuses an empty file
        raise CheckpointError(
            f"{path}: not a GGUF file, or truncated ({error}); download it again"
        ) from None


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size, self._at = path, data, len(data), 0
        self._elements = 0  # of all arrays but the vocabulary's

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise CheckpointError("it doesn't begin with GGUF")
        version, tensors, fields = self._numbers("IQQ")
        if version not in (2, 3):
            got = "a big-endian file" if version % 2**16 == 0 else version
            raise CheckpointError(f"expected version 2 or 3, little-endian, got {got}")
        self._check_count("fields", fields, 13, _MOST_FIELDS)
        self._check_count("tensors", tensors, 24, _MOST_TENSORS)
        found: dict[str, Field] = {}
        for _ in range(fields):
            start, name = self._at, self._string()
            if name in found:
                raise CheckpointError(f"{name}: the metadata has it twice")
            kind = self._number("I")
            found[name] = Field(kind, self._value(name, kind), start, self._at)
        alignment = _alignment(found)
        infos = [self._info() for _ in range(tensors)]
        data = -(-self._at // alignment) * alignment
        placed = tuple(self._placed(info, data, alignment) for info in infos)
        _check_overlap(placed)
        return Header(version, found, placed, alignment, data)

    def _value(self, name: str, kind: int) -> Any:
        if kind in SCALARS:
            number = self._number(SCALARS[kind])
            if not math.isfinite(number):
                raise CheckpointError(f"{name}: expected a finite number, got {number}")
            return number
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise CheckpointError(f"{name}: expected a type of GGUF, got {kind}")
        of, count = self._numbers("IQ")
        if of == STRING:
            self._check_array(name, count, 8)
            for _ in range(count):
                self._skip(self._number("Q"))
            return count
        if of not in SCALARS:
            raise CheckpointError(f"{name}: expected an array of numbers or strings, got {of}")
        self._check_array(name, count, struct.calcsize(SCALARS[of]))
        if count <= _MAX_NUMBERS:
            return list(self._numbers(f"{count}{SCALARS[of]}"))
        self._skip(count * struct.calcsize(SCALARS[of]))
        return count

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._number("I")
        if not 1 <= rank <= _MAX_DIMS:
            raise CheckpointError(f"{name}: expected 1 to {_MAX_DIMS} dims, got {rank}")
        dims = self._numbers(f"{rank}Q")
        kind, offset = self._numbers("IQ")
        return name, tuple(reversed(dims)), kind, offset

    def _placed(
        self, info: tuple[str, tuple[int, ...], int, int], data: int, alignment: int
    ) -> TensorInfo:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, shape, number, offset = info
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise _unknown_type(self._path, name, number) from None
        weights, nbytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % weights:
            raise CheckpointError(
                f"{name}: expected rows of blocks of {weights} weights of {kind.name}, got the "
                f"shape {list(shape)}"
            )
        total, start = math.prod(shape) // weights * nbytes, data + offset
        if offset % alignment:
            raise CheckpointError(f"{name}: expected a multiple of {alignment}, got {offset}")
        if start + total > self._size:
            raise CheckpointError(
                f"{name}: expected {total} bytes from {start} on, in a file of {self._size}"
            )
        return TensorInfo(self._path, name, kind.name, shape, start, total)

    def _check_count(self, name: str, count: int, least: int, most: int) -> None:
        """Refuse a count that the rest of the file can't hold, or too many to iterate."""
        if count * least > self._size - self._at:
            raise CheckpointError(f"{name}: {count} of them, more than the file holds")
        if count > most:
            raise CheckpointError(f"{name}: expected at most {most:,}, got {count:,}")

    def _check_array(self, name: str, count: int, least: int) -> None:
        if name in _VOCABULARY:
            self._check_count(name, count, least, _MOST_TOKENS)
            return
        self._elements += count
        self._check_count(name, count, least, _MOST_ELEMENTS - self._elements + count)

    def _string(self) -> str:
        try:
            return self._bytes(self._number("Q")).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"expected UTF-8 before byte {self._at}") from None

    def _number(self, code: str) -> Any:
        return self._numbers(code)[0]

    def _numbers(self, codes: str) -> tuple[Any, ...]:
        start = self._at
        self._skip(struct.calcsize(f"<{codes}"))
        return struct.unpack_from(f"<{codes}", self._data, start)

    def _bytes(self, count: int) -> bytes:
        self._skip(count)
        return self._data[self._at - count : self._at]

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise CheckpointError(f"{count} bytes at {self._at}, in a file of {self._size}")
        self._at += count


def _unknown_type(path: Path, name: str, number: int) -> CheckpointError | ModelError:
    """The error of a type that the gguf package doesn't know: a removed or newer one, or none."""
    if number >= _MOST_TYPES:
        return CheckpointError(f"{name}: expected a known type, got {number}")
    if number in _REMOVED:
        reason = "which llama.cpp has removed; take the file in another type, such as Q4_0"
    else:
        installed = importlib.metadata.version("gguf")
        reason = (
            f"which the installed gguf package {installed} doesn't know; update the gguf package: "
            "pip install -U gguf"
        )
    return ModelError(f"{path}: {name}: tensor type {number}, {reason}")


def _alignment(fields: Mapping[str, Field]) -> int:
    value = fields["general.alignment"].value if "general.alignment" in fields else 32
    if type(value) is not int or value < 1 or value & (value - 1):
        raise CheckpointError(f"general.alignment: expected a power of two, got {value!r}")
    return value


def _check_overlap(tensors: tuple[TensorInfo, ...]) -> None:
    by_place = sorted(tensors, key=lambda tensor: tensor.offset)
    for one, other in pairwise(by_place):
        if one.offset + one.nbytes > other.offset:
            raise CheckpointError(f"{one.name} and {other.name}: their data overlap")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise CheckpointError("two tensors have one name")


def without_vocabulary(path: Path, header: Header, out: Path) -> None:
    """Write the header of ``path`` to ``out``, with neither the vocabulary nor any values.

    The ``gguf`` package, and transformers' config with it, then takes no seconds to read it. Every
    tensor is there by name, in F32 and with no elements. Rotary scaling, on which transformers
    fails for gpt-oss, and the model's name, which it takes for an architecture, are left out too.
    """
    left_out = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")}
    left_out.add("general.name")
    kept = [
        field
        for name, field in header.fields.items()
        if name not in left_out and ".rope.scaling." not in name
    ]
    with path.open("rb") as file, out.open("wb") as light:
        counts = len(header.tensors), len(kept)
        light.write(b"GGUF" + struct.pack("<IQQ", header.version, *counts))
        for field in kept:
            file.seek(field.start)
            light.write(file.read(field.stop - field.start))
        for tensor in header.tensors:
            name = tensor.name.encode()
            light.write(struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 0, 0, 0))
        light.write(bytes(header.alignment))
