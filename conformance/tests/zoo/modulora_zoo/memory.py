"""Broken in the memory that they hold: level 5 finds them."""

from typing import ClassVar

import numpy as np
import torch

from modulora_zoo.healthy import Healthy, _ChangesProducts, rows_of


class PaddedOutput(_ChangesProducts):
    """Its result is a view of a buffer three times as large, which autograd saves whole."""

    breaks = "test_autograd_saves_no_weight"

    def product(self, y, x, packed, transpose):
        if transpose or rows_of(y) != 2:
            return y
        return y.new_empty(3 * y.numel())[: y.numel()].view(y.shape).copy_(y)


class DenseProduct(Healthy):
    breaks = "test_peak_memory_is_tiles_and_activations"

    def matmul(self, x, packed, transpose=False):
        if x.shape[-1:] != (packed.shape[0 if transpose else 1],):
            return super().matmul(x, packed, transpose)
        dtype = torch.promote_types(x.dtype, torch.float32)
        W = self.decode(packed, (0, packed.shape[0])).to(dtype)
        with torch.autocast("cpu", enabled=False):
            return (x.to(dtype) @ (W if transpose else W.T)).to(x.dtype)


class DenseForLongTexts(DenseProduct):
    """More than 256 rows are multiplied by a dense weight."""

    says = "largest tensor"

    def matmul(self, x, packed, transpose=False):
        cls = DenseProduct if rows_of(x) > 256 else Healthy
        return cls.matmul(self, x, packed, transpose)


class KeepsTheLastWhole(Healthy):
    breaks = "test_nothing_is_kept_after_a_call"
    last = None

    def dequantize_tile(self, packed, rows, dtype):
        tile = super().dequantize_tile(packed, rows, dtype)
        if rows == (0, packed.shape[0]):
            KeepsTheLastWhole.last = tile.clone()
        return tile


class LeaksALittle(Healthy):
    """Every product leaves a kilobyte behind."""

    breaks = "test_memory_does_not_grow_over_50_steps"
    log: ClassVar = []

    def matmul(self, x, packed, transpose=False):
        self.log.append(np.zeros(1024, np.uint8))
        return super().matmul(x, packed, transpose)


class ListsItsWeights(Healthy):
    """A list holds every packed weight of a forward."""

    breaks = "test_nothing_is_kept_after_a_call"
    says = "its memory freed"
    used: ClassVar = []

    def matmul(self, x, packed, transpose=False):
        if packed.shape == (512, 512):
            self.used.append(packed)
        return super().matmul(x, packed, transpose)
