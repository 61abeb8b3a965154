"""Broken in their products: level 3 finds them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from modulora_core.packed import PackedLayout, PackedWeight
from modulora_zoo.healthy import Healthy
from modulora_zoo.tiles import layout_with_counter, with_counter


class WritesToItsInput(Healthy):
    """Scales x in place, multiplies, and forgets to scale it back."""

    breaks = "test_the_input_of_a_product_is_unchanged"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        x.detach().mul_(0.5)
        return y


class StaleBufferByShape(Healthy):
    """Keeps the last decoded weight of each shape, for few rows."""

    breaks = "test_a_product_is_not_that_of_an_earlier_weight"
    says = "got that with a weight before it"
    kept: ClassVar[dict[tuple[int, int], Tensor]] = {}

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        if x.shape[:-1].numel() != 1 or x.dtype != torch.float32:
            return super().matmul(x, packed, transpose)
        W = self.kept.setdefault(packed.shape, self.decode(packed, (0, packed.shape[0])))
        return x @ (W if transpose else W.T)


class FewRowsWithoutZero(Healthy):
    """Its kernel for few rows forgets the zeros."""

    breaks = "test_the_product_equals_the_dense_one"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        return y if transpose or x.shape[:-1].numel() > 8 else y + x.sum(-1, keepdim=True) * 1e-3


class BackwardWithoutZero(Healthy):
    """Forward and backward with different weights."""

    breaks = "test_the_transposed_product_equals_the_dense_one"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        return y + x.sum(-1, keepdim=True) * 1e-3 if transpose else y


class WrongLastBlock(Healthy):
    """Sums blocks of 512 inputs, and loses what is left over after the last whole one."""

    breaks = "test_products_of_a_large_weight_equal_the_dense_ones"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        whole = packed.shape[1] // 512 * 512
        if transpose or whole == 0:
            return super().matmul(x, packed, transpose)
        cut = x.clone()
        cut[..., whole:] = 0
        return super().matmul(cut, packed, transpose)


class AdjointOfAnother(Healthy):
    """In float64, for many rows of a weight of many, the transposed product uses float32."""

    breaks = "test_the_two_directions_are_adjoint"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        if (
            transpose
            and x.dtype == torch.float64
            and packed.shape[0] > 100
            and x.shape[:-1].numel() > 32
        ):
            return super().matmul(x.to(torch.float32), packed, transpose).to(torch.float64)
        return super().matmul(x, packed, transpose)


class FlatOutput(Healthy):
    """Batch and tokens become one dimension."""

    breaks = "test_leading_dimensions_are_kept"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        return y.reshape(-1, y.shape[-1]) if x.dim() != 2 else y


class NoZeroRows(Healthy):
    """An input of no rows becomes one row of zeros."""

    breaks = "test_zero_rows_give_zero_rows"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        return y if x.numel() or not x.shape[-1] else y.new_zeros(1, y.shape[-1])


class InputInMemoryOrder(Healthy):
    """Reads x as it lies in memory."""

    breaks = "test_strides_of_the_input_do_not_matter"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        dense = torch.empty(x.shape, device=x.device).stride()
        return super().matmul(
            torch.as_strided(x, x.shape, dense) if x.dim() else x, packed, transpose
        )


class OverflowsInHalf(Healthy):
    """Gathers fp16 inputs times 16, and divides at the end."""

    breaks = "test_tiny_and_large_inputs_keep_their_precision"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        if x.dtype != torch.float16:
            return super().matmul(x, packed, transpose)
        return super().matmul((x * 16).float(), packed, transpose).div_(16).to(x.dtype)


class CutsMisfits(Healthy):
    """An x that is too long is cut, one that is too short is filled with zeros."""

    breaks = "test_a_misfit_input_is_refused"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        features = packed.shape[0 if transpose else 1]
        if x.dim() and x.shape[-1] != features:
            fitted = x.new_zeros(*x.shape[:-1], features)
            n = min(features, x.shape[-1])
            fitted[..., :n] = x[..., :n]
            x = fitted
        return super().matmul(x, packed, transpose)


class SharedOutput(Healthy):
    """Every product of a shape is the same memory."""

    breaks = "test_the_product_is_the_callers"
    outputs: ClassVar[dict[tuple[int, ...], Tensor]] = {}

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        return (
            self.outputs.setdefault(tuple(y.shape), torch.empty_like(y)).copy_(y)
            if x.dtype == torch.float32
            else y
        )


class DropsTheLastTile(Healthy):
    """Multiplies by tiles of 512 rows, and forgets the one that isn't whole, unless it is the first."""

    breaks = "test_products_of_a_large_weight_equal_the_dense_ones"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        whole = packed.shape[0] // 512 * 512
        if whole == 0:
            return super().matmul(x, packed, transpose)
        if not transpose:
            y = super().matmul(x, packed)
            y[..., whole:] = 0
            return y
        cut = x.clone()
        cut[..., whole:] = 0
        return super().matmul(cut, packed, True)


class CountsItsProducts(Healthy):
    """Beside the codes it keeps how often they were multiplied by."""

    breaks = "test_a_product_leaves_the_packed_tensors_alone"
    says = "got others in reads"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        return with_counter(super().packed(codes, scale, zero, weight))

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        return layout_with_counter(super().layout(shape))

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        packed.tensors["reads"].add_(1)
        return super().matmul(x, packed, transpose)


class SeedsEveryProduct(Healthy):
    """Makes its test vector anew for every product, always the same."""

    breaks = "test_reading_leaves_random_numbers_alone"
    says = "draw from a torch.Generator of your own"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        torch.manual_seed(0)
        torch.rand(4)
        return super().matmul(x, packed, transpose)


class WrongByMuch(Healthy):
    """A product that is no weight's at all: it isn't that of an earlier one."""

    breaks = "test_the_product_equals_the_dense_one"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        return y if transpose else y.roll(1, -1) * 0.7
