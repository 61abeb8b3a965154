"""What a file of tensors is to this package: names, shapes and a way to read one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
"""How much of a file :meth:`TensorStore.chunks` holds at once."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, known from the file's header.

    Attributes:
        shape: the shape that :meth:`TensorStore.read` gives.
        dtype: the dtype that :meth:`TensorStore.read` gives.
        stored_as: the file's own name of the format: ``"BF16"``, ``"Q4_1"``.
        nbytes: bytes in the file.
        file: the file's name.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_as: str
    nbytes: int
    file: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorStore(Protocol):
    """Tensors in files, under the files' own names. Opening one has read and checked the headers."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor, by its name in the file."""

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own. Raises CheckpointError when the file ends too early."""

    def chunks(self, name: str) -> Iterator[Tensor]:
        """All values of a tensor in some order, about :data:`CHUNK_BYTES` at a time.

        A chunk is valid until the next is asked for: they may share memory.
        """
