"""Write a GGUF file: a header whose metadata comes from another file, then one tensor at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from modulora_gguf.file.header import Field, Header

_DROPPED = ("general.file_type", "split.no", "split.count", "split.tensors.count")
"""The type that most tensors have, for which llama.cpp looks itself, and the parts of a model."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: its type's name, and its shape in torch's order."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return int(math.prod(self.shape) // weights * nbytes)


class TensorWriter:
    """Writes the header at once, and then :meth:`write` the values of each tensor in turn.

    Args:
        file: a new file, open for bytes.
        like: the header of the file whose metadata is copied.
        tensors: all tensors, in the order of their values.
    """

    def __init__(self, file: IO[bytes], like: Header, tensors: Sequence[NewTensor]) -> None:
        self._file, self._alignment = file, like.alignment
        fields = [field for name, field in like.fields.items() if name not in _DROPPED]
        _write_metadata(file, like, fields, len(tensors))
        offset = 0
        for tensor in tensors:
            dims, name = tuple(reversed(tensor.shape)), tensor.name.encode()
            file.write(struct.pack("<Q", len(name)) + name)
            file.write(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", GGMLQuantizationType[tensor.type], offset))
            offset += -(-tensor.nbytes // self._alignment) * self._alignment
        self._pad()

    def write(self, values: Tensor) -> None:
        """Write the bytes of one tensor: uint8, of any shape."""
        self._file.write(values.contiguous().numpy().data)
        self._pad()

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % self._alignment))


def without_vocabulary(header: Header, out: Path) -> None:
    """Write the header to ``out``, with neither the vocabulary nor any values.

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
    with out.open("wb") as light:
        _write_metadata(light, header, kept, len(header.tensors))
        for tensor in header.tensors:
            name = tensor.name.encode()
            light.write(struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 0, 0, 0))
        light.write(bytes(header.alignment))


def _write_metadata(file: IO[bytes], like: Header, fields: Sequence[Field], tensors: int) -> None:
    """Write the counts of tensors and fields, and the bytes of ``fields`` in the file ``like``."""
    file.write(b"GGUF" + struct.pack("<IQQ", like.version, tensors, len(fields)))
    with like.path.open("rb") as source:
        for field in fields:
            source.seek(field.start)
            file.write(source.read(field.stop - field.start))
