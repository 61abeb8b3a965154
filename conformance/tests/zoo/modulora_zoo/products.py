"""Broken in their products: level 3 finds them."""

from typing import ClassVar

import torch

from modulora_zoo.healthy import Healthy, _ChangesProducts, rows_of
from modulora_zoo.tiles import _Counting


class WritesToItsInput(_ChangesProducts):
    breaks = "test_the_input_of_a_product_is_unchanged"

    def product(self, y, x, packed, transpose):
        x.detach().mul_(0.5)
        return y


class CountsItsProducts(_Counting):
    breaks = "test_a_product_leaves_the_packed_tensors_alone"

    def matmul(self, x, packed, transpose=False):
        packed.tensors["reads"].add_(1)
        return super().matmul(x, packed, transpose)


class SharedOutput(_ChangesProducts):
    """Every product of a shape is the same memory."""

    breaks = "test_the_product_is_the_callers"
    outputs: ClassVar = {}

    def product(self, y, x, packed, transpose):
        if x.dtype != torch.float32:
            return y
        return self.outputs.setdefault(y.shape, torch.empty_like(y)).copy_(y)


class StaleBufferByShape(Healthy):
    """It keeps the first decoded weight of each shape, for one row."""

    breaks = "test_a_product_is_not_that_of_an_earlier_weight"
    says = "got the product with a weight before it"
    kept: ClassVar = {}

    def matmul(self, x, packed, transpose=False):
        if rows_of(x) != 1 or x.dtype != torch.float32:
            return super().matmul(x, packed, transpose)
        W = self.kept.setdefault(packed.shape, self.decode(packed, (0, packed.shape[0])))
        return x @ (W if transpose else W.T)


class SeedsEveryProduct(Healthy):
    breaks = "test_reading_leaves_global_state_alone"
    says = "draw from a torch.Generator of your own"

    def matmul(self, x, packed, transpose=False):
        torch.manual_seed(0)
        torch.rand(4)
        return super().matmul(x, packed, transpose)


class KeepsItsThreads(Healthy):
    """A product sets the number of threads that suits it."""

    breaks = "test_reading_leaves_global_state_alone"
    says = "expected the number of torch's threads unchanged"

    def matmul(self, x, packed, transpose=False):
        torch.set_num_threads(1)
        return super().matmul(x, packed, transpose)


class FewRowsWithoutZero(_ChangesProducts):
    """Its kernel for few rows omits the zeros."""

    breaks = "test_the_product_equals_the_dense_one"

    def product(self, y, x, packed, transpose):
        return y if transpose or rows_of(x) > 8 else y + x.sum(-1, keepdim=True) * 1e-3


class WrongByMuch(_ChangesProducts):
    """Its product is no weight's at all."""

    breaks = "test_the_product_equals_the_dense_one"

    def product(self, y, x, packed, transpose):
        return y if transpose else y.roll(1, -1) * 0.7


class BackwardWithoutZero(_ChangesProducts):
    breaks = "test_the_transposed_product_equals_the_dense_one"

    def product(self, y, x, packed, transpose):
        return y + x.sum(-1, keepdim=True) * 1e-3 if transpose else y


class WrongLastBlock(Healthy):
    """It sums blocks of 512 inputs, and omits a last short one."""

    breaks = "test_products_of_a_large_weight_equal_the_dense_ones"

    def matmul(self, x, packed, transpose=False):
        whole = packed.shape[1] // 512 * 512
        if whole and not transpose:
            x = x.clone()
            x[..., whole:] = 0
        return super().matmul(x, packed, transpose)


class DropsTheLastTile(Healthy):
    """It multiplies by tiles of 512 rows, and omits a last short one."""

    breaks = "test_products_of_a_large_weight_equal_the_dense_ones"

    def matmul(self, x, packed, transpose=False):
        whole = packed.shape[0] // 512 * 512
        x = x.clone()
        if whole and transpose:
            x[..., whole:] = 0
        y = super().matmul(x, packed, transpose)
        if whole and not transpose:
            y[..., whole:] = 0
        return y


class AdjointOfAnother(_ChangesProducts):
    """For a tall weight and many rows, the transposed product uses float32 for float64."""

    breaks = "test_the_two_directions_are_adjoint"

    def product(self, y, x, packed, transpose):
        tall = packed.shape[0] > 100 and rows_of(x) > 32
        return y.float().double() if transpose and tall and x.dtype == torch.float64 else y


class FlatOutput(_ChangesProducts):
    """It merges batch and tokens."""

    breaks = "test_leading_dimensions_are_kept"

    def product(self, y, x, packed, transpose):
        return y.reshape(-1, y.shape[-1]) if x.dim() != 2 else y


class ColumnsInARow(_ChangesProducts):
    """Its result is a transposed view."""

    breaks = "test_leading_dimensions_are_kept"
    says = "expected a contiguous result"

    def product(self, y, x, packed, transpose):
        return y.mT.contiguous().mT if y.dim() == 3 else y


class NoZeroRows(_ChangesProducts):
    """It returns a row for an input without rows."""

    breaks = "test_zero_rows_give_zero_rows"

    def product(self, y, x, packed, transpose):
        return y if x.numel() or not x.shape[-1] else y.new_zeros(1, y.shape[-1])


class InputInMemoryOrder(Healthy):
    breaks = "test_strides_of_the_input_do_not_matter"

    def matmul(self, x, packed, transpose=False):
        if x.dim():
            x = torch.as_strided(x, x.shape, torch.empty(x.shape).stride())
        return super().matmul(x, packed, transpose)


class OverflowsInHalf(Healthy):
    """It multiplies fp16 inputs by 16, and divides at the end."""

    breaks = "test_tiny_and_large_inputs_keep_their_precision"

    def matmul(self, x, packed, transpose=False):
        if x.dtype != torch.float16:
            return super().matmul(x, packed, transpose)
        return super().matmul((x * 16).float(), packed, transpose).div_(16).to(x.dtype)


class CutsMisfits(Healthy):
    """It cuts an x that is too long, and pads an x that is too short."""

    breaks = "test_a_misfit_input_is_refused"

    def matmul(self, x, packed, transpose=False):
        features = packed.shape[0 if transpose else 1]
        if x.dim():
            x = torch.nn.functional.pad(x, (0, features - x.shape[-1]))
        return super().matmul(x, packed, transpose)


class OmitsTheLastOfRagged(Healthy):
    """Of out = 32 n + 1 outputs, the transposed product omits the last."""

    breaks = "test_products_of_ragged_weights_equal_the_dense_ones"

    def matmul(self, x, packed, transpose=False):
        if transpose and packed.shape[0] in (129, 257) and x.shape[-1:] == packed.shape[:1]:
            x = torch.cat([x[..., :-1], 0 * x[..., -1:]], dim=-1)
        return super().matmul(x, packed, transpose)


class RepeatsTheLastOfRagged(_ChangesProducts):
    """It reads a last block of columns from a whole block's place before the end."""

    breaks = "test_products_of_ragged_weights_equal_the_dense_ones"

    def product(self, y, x, packed, transpose):
        if not transpose and packed.shape[1] in (130, 258):
            last = self.dequantize_tile(packed, (0, packed.shape[0]), torch.float32)[:, -2:]
            y = y + (x[..., -2:].float() @ last.T).to(y.dtype)
        return y


class SingleForManyRows(_ChangesProducts):
    """Of more rows than a block has, the product stays in fp32."""

    breaks = "test_products_of_a_large_weight_equal_the_dense_ones"
    says = "expected a product in torch.float16, got torch.float32"

    def product(self, y, x, packed, transpose):
        return y.float() if rows_of(x) > 100 and x.dtype != torch.float64 else y


class OneRowOfAnExpandedInput(_ChangesProducts):
    """It multiplies one row of an x whose rows share memory, with another value."""

    breaks = "test_strides_of_the_input_do_not_matter"

    def product(self, y, x, packed, transpose):
        return 2 * y if x.dim() > 1 and x.stride(0) == 0 and len(x) > 1 else y


class SumsInHalf(Healthy):
    """It sums the tiles of a large weight in the dtype of its input."""

    breaks = "test_products_of_a_large_weight_equal_the_dense_ones"

    def matmul(self, x, packed, transpose=False):
        if not transpose or packed.shape[0] < 200 or x.dtype not in (torch.half, torch.bfloat16):
            return super().matmul(x, packed, transpose)
        y = x.new_zeros(*x.shape[:-1], packed.shape[1])
        for row in range(packed.shape[0]):
            y += x[..., row : row + 1] * self.dequantize_tile(packed, (row, row + 1), x.dtype)
        return y


class BFloat16InHalf(Healthy):
    """It multiplies bf16 in fp16, whose range is smaller."""

    breaks = "test_tiny_and_large_inputs_keep_their_precision"

    def matmul(self, x, packed, transpose=False):
        if x.dtype == torch.bfloat16 and float(x.abs().max() if x.numel() else 0) > 1e5:
            x = x.half().bfloat16()
        return super().matmul(x, packed, transpose)


class OtherForOneToken(Healthy):
    """Its path for decoding one token of one sequence has another scale."""

    breaks = "test_leading_dimensions_are_kept"

    def matmul(self, x, packed, transpose=False):
        return super().matmul(x, packed, transpose) * (1.001 if x.shape[:-1] == (1, 1) else 1)


class ColumnsOfAProductInInt16(Healthy):
    """A product reads columns from 32,768 on from the first ones again."""

    breaks = "test_products_of_long_weights_equal_the_dense_ones"
    says = "product of few rows"

    def matmul(self, x, packed, transpose=False):
        if transpose or packed.shape[1] <= 2**15:
            return super().matmul(x, packed, transpose)
        x, rest = x.clone(), x[..., 2**15 :]
        x[..., 2**15 :] = 0
        x[..., : rest.shape[-1]] += rest
        return super().matmul(x, packed, transpose)


class AddsBlocksInHalf(Healthy):
    """It adds the sums of 16 columns in the dtype of its input."""

    breaks = "test_long_sums_keep_their_precision"

    def matmul(self, x, packed, transpose=False):
        if transpose or x.dtype != torch.bfloat16 or not x.dim():
            return super().matmul(x, packed, transpose)
        if x.shape[-1] != packed.shape[1]:
            return super().matmul(x, packed, transpose)
        W = self.dequantize_tile(packed, (0, packed.shape[0]), x.dtype)
        blocks = (x[..., None, :].float() * W.float()).split(16, dim=-1)
        y = x.new_zeros(*x.shape[:-1], packed.shape[0])
        for block in blocks:
            y += block.sum(-1).to(x.dtype)
        return y
