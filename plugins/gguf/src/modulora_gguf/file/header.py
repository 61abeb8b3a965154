"""Parse the header of a GGUF file: its metadata, and the place of each tensor.

::

    "GGUF"  version  tensors  fields             uint32, uint64, uint64, little-endian
    each field     name, kind, value             an array has a kind, a count, and elements
    each tensor    name, dims, type, offset      dims from the last to the first
    data           begins at the next multiple of general.alignment

The ``gguf`` package makes two arrays of every token of a vocabulary, which takes seconds. This
parser walks over them, and checks every count and place against the size of the file.
"""

from __future__ import annotations

import importlib.metadata
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modulora_core.errors import CheckpointError, ModelError

STRING, ARRAY = 8, 9
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MAX_DIMS = 4
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
    """A tensor: ``type`` has llama.cpp's name (``"Q4_1"``), ``shape`` is in torch's order, and
    ``offset`` is of the first byte in the file ``path``."""

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of the file ``path``. A split model has the tensors of all its files."""

    path: Path
    version: int
    fields: Mapping[str, Field]
    tensors: tuple[TensorInfo, ...]
    alignment: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's class. Raises CheckpointError if there is none."""
        return self.text("general.architecture")

    def text(self, name: str, default: str | None = None) -> str:
        """A field that must be a string. Raises CheckpointError."""
        field = self.fields.get(name)
        if field is None and default is not None:
            return default
        if field is None or not isinstance(field.value, str):
            got = "none" if field is None else f"a value of type {field.kind}"
            raise CheckpointError(f"{name}: expected a string in the metadata, got {got}")
        return field.value


def read_part(path: Path) -> Header:
    """Parse the header of one file.

    Raises:
        CheckpointError: it isn't a GGUF file, or it is truncated or damaged.
        ModelError: a tensor has a type that the installed gguf package doesn't know.
    """
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

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise CheckpointError("it doesn't begin with GGUF")
        version, tensors, fields = self._numbers("IQQ")
        if version not in (2, 3):
            got = "a big-endian file" if version % 2**16 == 0 else version
            raise CheckpointError(f"expected version 2 or 3, little-endian, got {got}")
        self._check_count("fields", fields, 13)
        self._check_count("tensors", tensors, 24)
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
        if len({tensor.name for tensor in placed}) < len(placed):
            raise CheckpointError("two tensors have one name")
        return Header(self._path, version, found, placed, alignment)

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
            self._check_count(name, count, 8)
            for _ in range(count):
                self._skip(self._number("Q"))
            return count
        if of not in SCALARS:
            raise CheckpointError(f"{name}: expected an array of numbers or strings, got {of}")
        self._check_count(name, count, struct.calcsize(SCALARS[of]))
        if count <= _MAX_NUMBERS:
            return list(self._numbers(f"{count}{SCALARS[of]}"))
        self._skip(count * struct.calcsize(SCALARS[of]))
        return count

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._number("I")
        if not 1 <= rank <= _MAX_DIMS:
            raise CheckpointError(f"{name}: expected 1 to {_MAX_DIMS} dims, got {rank}")
        dims = self._numbers(f"{rank}Q")
        type, offset = self._numbers("IQ")
        return name, tuple(reversed(dims)), type, offset

    def _placed(
        self, info: tuple[str, tuple[int, ...], int, int], data: int, alignment: int
    ) -> TensorInfo:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, shape, number, offset = info
        try:
            type = GGMLQuantizationType(number)
        except ValueError:
            installed = importlib.metadata.version("gguf")
            raise ModelError(
                f"{self._path}: {name}: tensor type {number}, which the installed gguf package "
                f"{installed} doesn't know; take the file in another type, such as Q4_0, or update "
                "the gguf package: pip install -U gguf"
            ) from None
        weights, nbytes = GGML_QUANT_SIZES[type]
        if 0 in shape or shape[-1] % weights:
            raise CheckpointError(
                f"{name}: expected rows of blocks of {weights} weights of {type.name}, got the "
                f"shape {list(shape)}"
            )
        total, start = math.prod(shape) // weights * nbytes, data + offset
        if offset % alignment:
            raise CheckpointError(f"{name}: expected a multiple of {alignment}, got {offset}")
        if start + total > self._size:
            raise CheckpointError(
                f"{name}: expected {total} bytes from {start} on, in a file of {self._size}"
            )
        return TensorInfo(self._path, name, type.name, shape, start, total)

    def _check_count(self, name: str, count: int, least: int) -> None:
        """Refuse a count of parts of ``least`` bytes that the rest of the file can't hold."""
        if count * least > self._size - self._at:
            raise CheckpointError(f"{name}: {count} of them, more than the file holds")

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


def _alignment(fields: Mapping[str, Field]) -> int:
    value = fields["general.alignment"].value if "general.alignment" in fields else 32
    if type(value) is not int or value < 1 or value & (value - 1):
        raise CheckpointError(f"general.alignment: expected a power of two, got {value!r}")
    return value
