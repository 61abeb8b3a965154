"""Broken in what they hold: level 5 finds them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_zoo.healthy import Healthy


class PaddedOutput(Healthy):
    """Returns the first part of a buffer three times as large, which autograd keeps whole."""

    breaks = "test_autograd_saves_no_weight"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        if transpose or y.shape[:-1].numel() != 2:
            return y
        buffer = y.new_empty(3 * y.numel())
        return buffer[: y.numel()].view(y.shape).copy_(y)


class DenseProduct(Healthy):
    """Multiplies by the whole dense weight."""

    breaks = "test_peak_memory_is_tiles_and_activations"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        if x.shape[-1:] != (packed.shape[0 if transpose else 1],):
            return super().matmul(x, packed, transpose)
        dtype = torch.promote_types(x.dtype, torch.float32)
        W = self.decode(packed, (0, packed.shape[0])).to(dtype)
        return (x.to(dtype) @ (W if transpose else W.T)).to(x.dtype)


class KeepsTheLastWhole(Healthy):
    """A dense weight is kept: the last one that was decoded whole."""

    breaks = "test_nothing_is_kept_after_a_call"
    last: ClassVar[Any] = None

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        tile = super().dequantize_tile(packed, rows, dtype)
        if rows == (0, packed.shape[0]):
            KeepsTheLastWhole.last = tile.clone()
        return tile


class LeaksALittle(Healthy):
    """Every product leaves a kilobyte behind."""

    breaks = "test_memory_does_not_grow_over_50_steps"
    log: ClassVar[list[Any]] = []

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        self.log.append(np.zeros(1024, np.uint8))
        return super().matmul(x, packed, transpose)
