"""The interface of a file of tensors: names, shapes, and a way to read one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, known from the file's header.

    Attributes:
        shape, dtype: of the tensor that :meth:`TensorStore.read` gives.
        stored_as: the file's own name of the format: ``"BF16"``, ``"Q4_1"``.
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
    """Tensors in files, under the files' own names. Opening one reads and checks the headers."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor, by its name in the file."""

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory. Raises CheckpointError if the file ends too early."""


def is_finite(values: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf. Integers are finite, and so is the meta device."""
    if not values.is_floating_point() or values.numel() == 0 or values.is_meta:
        return True
    if values.dtype.itemsize == 1:  # 8-bit floats have no arithmetic of their own
        values = values.to(torch.float32)
    low, high = torch.aminmax(values)  # max is NaN if any number is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(values: Tensor, name: str, folder: Path | str) -> Tensor:
    """Return ``values``. Raises CheckpointError if it has NaN or Inf."""
    if is_finite(values):
        return values
    raise CheckpointError(
        f"{folder}: {name}: expected finite values, got NaN or Inf; download or quantize the model "
        "again"
    )
