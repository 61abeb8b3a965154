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

from modulora_gguf.file.header import Header

_DROPPED = ("general.file_type", "split.no", "split.count", "split.tensors.count")
"""The type that most tensors have, for which llama.cpp looks itself, and the parts of a model."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: its type's name, and its shape in torch's order."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return int(math.prod(self.shape) // weights * nbytes)


class GGUFFileWriter:
    """Writes the header at once, and then :meth:`write` the values of each tensor in turn.

    Args:
        file: a new file, open for bytes.
        like: the file whose metadata is copied; ``header`` is its header.
        tensors: all tensors, in the order of their values.
    """

    def __init__(
        self, file: IO[bytes], like: Path, header: Header, tensors: Sequence[NewTensor]
    ) -> None:
        self._file, self._alignment = file, header.alignment
        fields = {name: field for name, field in header.fields.items() if name not in _DROPPED}
        file.write(b"GGUF" + struct.pack("<IQQ", header.version, len(tensors), len(fields)))
        with like.open("rb") as source:
            for field in fields.values():
                source.seek(field.start)
                file.write(source.read(field.stop - field.start))
        offset = 0
        for tensor in tensors:
            dims, name = tuple(reversed(tensor.shape)), tensor.name.encode()
            file.write(struct.pack("<Q", len(name)) + name)
            file.write(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", GGMLQuantizationType[tensor.kind], offset))
            offset += -(-tensor.nbytes // self._alignment) * self._alignment
        self._pad()

    def write(self, values: Tensor) -> None:
        """Write the bytes of one tensor: uint8, of any shape."""
        self._file.write(values.contiguous().numpy().data)
        self._pad()

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % self._alignment))
