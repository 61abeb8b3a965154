"""Broken at the sizes of real layers, at some rows of x, or at some widths."""

from typing import ClassVar

import torch

from modulora_core.packed import PackedLayout, TensorLayout
from modulora_zoo.healthy import Healthy, _ChangesProducts, changed, rows_of

REAL = "test_a_real_layer_keeps_the_error_in_every_piece"
REAL_TILES = "test_tiles_of_a_real_layer_equal_the_whole"
REAL_PRODUCTS = "test_products_of_a_real_layer_equal_the_dense_ones"
COMMON = "test_layers_with_common_sides_keep_the_error_in_every_piece"
COMMON_PRODUCTS = "test_products_of_layers_with_common_sides_equal_the_dense_ones"
ANY_ROWS = "test_products_of_any_number_of_rows_equal_the_dense_ones"
UNCHANGED = "test_any_number_of_rows_is_left_unchanged"
CALLERS = "test_products_of_any_number_of_rows_are_the_callers"
OTHER_WIDTHS = "test_bits_per_weight_keep_the_promise_at_other_widths"
IDS = "test_hundreds_of_distant_ids_give_the_rows_of_the_tile"

MIB = 2**20


class IndexInFloats(Healthy):
    """Beyond 2**24 an index is a float, so that odd elements are the even ones before them."""

    breaks = REAL

    def packed(self, codes, scale, zero, weight):
        if weight.numel() > 2**24:
            codes[-1, 1::2] = codes[-1, ::2]
        return super().packed(codes, scale, zero, weight)


class GroupsInAByte(Healthy):
    """In a tall weight, the number of a group is a byte."""

    breaks = REAL

    def spread(self, packed, name, rows):
        values = packed.tensors[name]
        if min(values.shape) > 256:
            values = values[:, torch.arange(values.shape[1], device=values.device) % 256]
            packed = changed(packed, **{name: values})
        return super().spread(packed, name, rows)


class LosesAMegabyte(Healthy):
    """A tile of more than 4 MiB ends early."""

    breaks = REAL

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if tile.numel() * 4 > 4 * MIB:
            tile[-1, tile.shape[1] // 2 :] = 0
        return tile


class StaleScales(Healthy):
    """It packs a large weight in parts, and the last part has the scales of the one before."""

    breaks = REAL

    def packed(self, codes, scale, zero, weight):
        if weight.numel() * 4 > 8 * MIB:
            scale[-16:] = scale[-32:-16]
        return super().packed(codes, scale, zero, weight)


class LastRowOfALargeTile(Healthy):
    """A large tile that does not begin at the first row ends with its first row."""

    breaks = REAL_TILES

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if rows[0] and tile.numel() * 4 > 4 * MIB:
            tile[-1] = tile[0]
        return tile


class LastOutputOfALargeWeight(_ChangesProducts):
    breaks = REAL_PRODUCTS

    def product(self, y, x, packed, transpose):
        if packed.shape[0] * packed.shape[1] > 2**24 and transpose:
            y[..., -1] = 0
        return y


class LargeWeightIn16Bits(_ChangesProducts):
    """With a large weight, products of bf16 x are half as large again."""

    breaks = REAL_PRODUCTS

    def product(self, y, x, packed, transpose):
        large = packed.shape[0] * packed.shape[1] > 2**24
        return y * 1.5 if large and not transpose and x.dtype == torch.bfloat16 else y


class HalfOfALargeWeight(_ChangesProducts):
    """It sums the products with a large weight in fp16."""

    breaks = REAL_PRODUCTS

    def product(self, y, x, packed, transpose):
        large = packed.shape[0] * packed.shape[1] > 4 * MIB
        return y.half().to(y.dtype) if large and not transpose else y


class EndOfWholeBlocks(Healthy):
    """If 1024 divides both sides, it omits the last row."""

    breaks = COMMON

    def packed(self, codes, scale, zero, weight):
        if len(weight) % 1024 == weight.shape[1] % 1024 == 0:
            scale[-1] = 0
        return super().packed(codes, scale, zero, weight)


class FirstScaleOf4096(Healthy):
    """If 4096 divides the columns, the last group has the first one's scale."""

    breaks = COMMON

    def packed(self, codes, scale, zero, weight):
        if weight.shape[1] % 4096 == 0 and weight.shape[1] < 16384:
            scale[:, -1] = scale[:, 0]
        return super().packed(codes, scale, zero, weight)


class OneBesideAThousand(Healthy):
    """Of 1,025 rows, it reads the last one from the first row of the tile."""

    breaks = COMMON

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if packed.shape[0] == 1025 == rows[1] and len(tile) > 1:
            tile[-1] = tile[0]
        return tile


class NoRestOf896(_ChangesProducts):
    """It multiplies blocks of 512 of 896 rows, and omits the others."""

    breaks = COMMON_PRODUCTS

    def product(self, y, x, packed, transpose):
        if packed.shape[0] == 896 and not transpose and rows_of(x) > 1:
            y[..., 512:] = 0
        return y


class TwiceTheEndOf1026(Healthy):
    """It adds the last two of 1,026 columns twice."""

    breaks = COMMON_PRODUCTS

    def matmul(self, x, packed, transpose=False):
        if packed.shape[1] == 1026 and not transpose:
            x = x.clone()
            x[..., -2:] *= 2
        return super().matmul(x, packed, transpose)


class WrongFor64(Healthy):
    breaks = ANY_ROWS

    def matmul(self, x, packed, transpose=False):
        return super().matmul(x, packed, transpose) * (1.001 if rows_of(x) == 64 else 1)


class NoLastOf128(_ChangesProducts):
    """Of 128 rows the transposed product omits the last."""

    breaks = ANY_ROWS

    def product(self, y, x, packed, transpose):
        if transpose and rows_of(x) == 128:
            y[-1] = 0
        return y


class NoRowBeyond4096(_ChangesProducts):
    breaks = ANY_ROWS

    def product(self, y, x, packed, transpose):
        if rows_of(x) > 4096:
            y[4096:] = 0
        return y


class CoarseFor512(_ChangesProducts):
    """512 rows of fp16 are a tenth too large."""

    breaks = ANY_ROWS

    def product(self, y, x, packed, transpose):
        coarse = rows_of(x) == 512 and x.dtype == torch.float16
        return 1.1 * y if coarse else y


class LongTextsIn16Bits(_ChangesProducts):
    """From 521 rows of 16 bits on, products are half as large again."""

    breaks = ANY_ROWS

    def product(self, y, x, packed, transpose):
        return y * 1.5 if rows_of(x) > 520 and x.dtype.itemsize == 2 else y


class ScalesItsInputOf32(_ChangesProducts):
    breaks = UNCHANGED

    def product(self, y, x, packed, transpose):
        if rows_of(x) == 32:
            x.detach().mul_(0.5)
        return y


class ClearsItsInputOf2048(_ChangesProducts):
    """After the transposed product of a long text it clears the last row of x."""

    breaks = UNCHANGED

    def product(self, y, x, packed, transpose):
        if rows_of(x) == 2048 and transpose:
            x.detach()[-1] = 0
        return y


class OneBufferFor65(_ChangesProducts):
    breaks = CALLERS
    outputs: ClassVar = {}

    def product(self, y, x, packed, transpose):
        if rows_of(x) != 65 or x.dtype != torch.float32:
            return y
        return self.outputs.setdefault(y.shape, torch.empty_like(y)).copy_(y)


class OneBufferForLongTexts(_ChangesProducts):
    breaks = CALLERS
    outputs: ClassVar = {}

    def product(self, y, x, packed, transpose):
        if rows_of(x) < 4000:
            return y
        return self.outputs.setdefault(y.shape, torch.empty_like(y)).copy_(y)


class _WithRest(Healthy):
    """A packed tensor without meaning."""

    breaks = OTHER_WIDTHS

    def rest(self, shape):
        raise NotImplementedError

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        return changed(found, rest=torch.zeros(self.rest(found.shape), dtype=torch.uint8))

    def layout(self, shape):
        found = super().layout(shape)
        tensors = {**found.tensors, "rest": TensorLayout("uint8", (self.rest(shape),))}
        return PackedLayout(found.quantizer, 1, shape, tensors, found.metadata)


class PadsToWholeBlocks(_WithRest):
    """It pads a row of more than 512 columns to a multiple of 2048."""

    def rest(self, shape):
        return shape[0] * (-shape[1] % 2048 // 2 if shape[1] > 512 else 0)


class MoreForWideRows(_WithRest):
    """Rows of more than 2048 columns have a byte more for each 4 weights."""

    def rest(self, shape):
        return shape[0] * (shape[1] // 4 if shape[1] > 2048 else 0)


class IdsIn16Bits(Healthy):
    """It gathers many ids as 16-bit numbers."""

    breaks = IDS

    def lookup(self, ids, packed, dtype):
        return super().lookup(ids % 2**16 if ids.numel() > 100 else ids, packed, dtype)


class SortsManyIds(Healthy):
    """Many ids are sorted, and their rows returned so."""

    breaks = IDS

    def lookup(self, ids, packed, dtype):
        if ids.numel() > 100:
            ids = ids.flatten().sort().values.view(ids.shape)
        return super().lookup(ids, packed, dtype)


class HalfOfInt32(Healthy):
    """Of many int32 ids it takes the larger ones for the largest of 15 bits."""

    breaks = IDS

    def lookup(self, ids, packed, dtype):
        if ids.dtype == torch.int32 and ids.numel() > 100:
            ids = ids.clamp(max=2**15 - 1)
        return super().lookup(ids, packed, dtype)
