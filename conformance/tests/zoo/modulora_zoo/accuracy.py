"""Broken at some shape, magnitude or sign: level 1 finds them."""

from typing import ClassVar

import torch

from modulora_core.spec import check_rows
from modulora_zoo.healthy import LEVELS, Healthy, changed

WIDTHS = "test_weights_of_any_width_keep_the_error"
ENDS = "test_the_ends_are_as_exact_as_the_middle"
LONG = "test_long_weights_keep_the_error"
MAGNITUDE = "test_a_weight_of_any_magnitude_is_packed_or_refused"
HALF = "test_float16_weights_give_finite_float16_tiles"
SIGN = "test_rows_of_one_sign_keep_the_error"
OUTLIER = "test_an_outlier_stays_alone"
SMALLEST = "test_the_smallest_blocks_keep_the_error"


class PaddingInTheScale(Healthy):
    """It fills the last block with ones, which the scale counts."""

    breaks = WIDTHS

    def grouped(self, W):
        n, G = -(-W.shape[1] // self.options.group_size), self.options.group_size
        return torch.nn.functional.pad(W, (0, n * G - W.shape[1]), value=1.0).view(len(W), n, G)


class ScaleOfTheBlockBefore(Healthy):
    """A short last block has half of the scale of the block before."""

    breaks = WIDTHS

    def spread(self, packed, name, rows):
        spread, rest = super().spread(packed, name, rows), packed.shape[1] % 32
        if name == "scale" and 0 < rest < packed.shape[1]:
            spread[:, -rest:] = spread[:, -rest - 1 : -rest] / 2
        return spread


class DropsBlocksOfTwo(Healthy):
    """A last block of two weights is zero."""

    breaks = WIDTHS

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if packed.shape[1] % 32 == 2:
            tile[:, -2:] = 0
        return tile


class HalvesTheLastColumn(Healthy):
    """The last code of a long row is half, unless 4 divides its length."""

    breaks = ENDS

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if packed.shape[1] % 4 and 64 < packed.shape[1] < 1000:
            tile[:, -1] /= 2
        return tile


class HalvesTheLastRow(Healthy):
    """Of rows in pairs, an odd last one has a scale that is halved twice."""

    breaks = ENDS
    says = "the last row of a"

    def packed(self, codes, scale, zero, weight):
        if len(weight) % 2 and 64 < len(weight) < 1000:
            scale[-1] /= 2
        return super().packed(codes, scale, zero, weight)


class ColumnsInInt16(Healthy):
    """Columns from 32,768 on are the first ones again."""

    breaks = LONG
    says = "of few rows"

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        tile[:, 2**15 :] = tile[:, : max(0, tile.shape[1] - 2**15)].clone()
        return tile


class ForgetsTheRestOfTheRows(Healthy):
    """It packs blocks of 1,024 rows, and gives the rest of a taller weight no scale."""

    breaks = ENDS
    says = "the last 64 rows of a [1101, 64] weight"

    def packed(self, codes, scale, zero, weight):
        if len(weight) > 1024:
            scale[len(weight) // 1024 * 1024 :] = 0
        return super().packed(codes, scale, zero, weight)


class LosesTheLastOfOddColumns(Healthy):
    """The last code of a long row is lost, unless 4 divides the length."""

    breaks = ENDS
    says = "the last column"

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if packed.shape[1] % 4 and packed.shape[1] > 300:
            tile[:, -1] = 0
        return tile


class LosesTheLastOfLongRows(Healthy):
    """The last code of a very long row is lost."""

    breaks = LONG
    says = "error at the end of few rows"

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if packed.shape[1] > 2000:
            tile[:, -1] = 0
        return tile


class ScaleOfTheNextBlock(Healthy):
    """From the fifth block of a row on, it uses the scale of the block before."""

    breaks = "test_columns_of_other_magnitudes_keep_the_error"

    def spread(self, packed, name, rows):
        spread = super().spread(packed, name, rows)
        if packed.shape == (24, 256):
            spread[:, 128:] = spread[:, 96:-32].clone()
        return spread


class RowsInUint16(Healthy):
    """Rows from 65,536 on are the first ones again."""

    breaks = LONG
    says = "the end of few columns"

    def packed(self, codes, scale, zero, weight):
        scale[2**16 :] = scale[: max(0, len(scale) - 2**16)] / 3
        return super().packed(codes, scale, zero, weight)


class SmallestStep(Healthy):
    """Its smallest scale is 1e-6."""

    breaks = MAGNITUDE

    def check_scales(self, W, scale):
        scale[(scale > 0) & (scale < 1e-6)] = 1e-6


class ClampsToOne(Healthy):
    """Weights above 100 are clipped."""

    breaks = MAGNITUDE

    def prepared(self, weight):
        W = super().prepared(weight)
        return torch.where(W.isfinite(), W.clamp(-100, 100), W)


class SubtractsInHalf(Healthy):
    """It multiplies codes and zero points by the scale in fp16, and subtracts them then."""

    breaks = HALF

    def decode(self, packed, rows):
        scale, zero = (self.spread(packed, name, rows).half() for name in ("scale", "zero"))
        codes = self.codes(packed, rows).half()
        found = (codes * scale - zero * scale).float()
        return torch.where(scale > 1000, found, super().decode(packed, rows))


class RoundsScalesUp(Healthy):
    """Scales are rounded up to a power of two, so that large weights exceed fp16."""

    breaks = HALF

    def packed(self, codes, scale, zero, weight):
        if float(weight.abs().max()) > 2e4:
            scale = (scale.float() * 1.2).half()
        return super().packed(codes, scale, zero, weight)


class ZeroPointOfUnsignedCodes(Healthy):
    """A range above or below zero is not widened, and its zero point is clamped."""

    breaks = SIGN

    def limits(self, groups):
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        return (low, high) if float(high.max()) < 0 else super().limits(groups)

    def packed(self, codes, scale, zero, weight):
        return super().packed(codes, scale, zero.clamp(0, LEVELS), weight)


class EqualWeightsBelowZero(Healthy):
    """Groups of equal weights keep their largest magnitude, without its sign."""

    breaks = SIGN
    says = "equal weights"

    def prepared(self, weight):
        W = super().prepared(weight)
        return torch.where((W[:, :1] == W).all(1, keepdim=True), W.abs(), W)


class ClipsOutliers(Healthy):
    """It clips at 35 standard deviations."""

    breaks = OUTLIER
    says = "error of the outlier"

    def prepared(self, weight):
        W = super().prepared(weight)
        most = 35 * float(W.double().square().mean().sqrt())
        return W.clamp(-most, most)


class OneScaleWithOutliers(Healthy):
    """An outlier gives the scale of all rows in its column of blocks."""

    breaks = OUTLIER
    says = "rows without the outlier"

    def limits(self, groups):
        low, high = super().limits(groups)
        if float(groups.abs().max()) > 50 * float(groups.square().mean().sqrt()):
            low, high = (x.expand_as(low) for x in (low.amin(0), high.amax(0)))
        return low, high


class BlocksOfZerosHaveAScale(Healthy):
    """A block of zeros in a row of others takes half of a step."""

    breaks = "test_zeros_stay_zeros"
    says = "64 columns zero"

    def packed(self, codes, scale, zero, weight):
        empty = (scale == 0) & (scale > 0).any(1, keepdim=True)
        scale = torch.where(empty, scale.amax(1, keepdim=True), scale)
        return super().packed(codes, scale, torch.where(empty, zero - 1, zero), weight)


class ViewsFromTheStart(Healthy):
    """It reads a view from the beginning of its storage."""

    breaks = "test_strides_do_not_matter"

    def prepared(self, weight):
        return super().prepared(torch.as_strided(weight, weight.shape, weight.stride(), 0))


class ReadsASkeleton(Healthy):
    """It packs a weight of the meta device as zeros."""

    breaks = "test_a_weight_without_values_is_refused"

    def prepared(self, weight):
        weight = torch.zeros(weight.shape) if weight.device.type == "meta" else weight
        return super().prepared(weight)


class TableOnTheCPU(Healthy):
    """Its table of codes stays on the CPU."""

    breaks = "test_the_meta_device_gives_shapes_and_dtypes"
    table = torch.arange(LEVELS + 1.0)

    def decode(self, packed, rows):
        scale, zero = (self.spread(packed, name, rows) for name in ("scale", "zero"))
        return (self.table[self.codes(packed, rows).long()] - zero) * scale


class DecidesByAScale(Healthy):
    """It reads a value to decide how to multiply."""

    breaks = "test_the_meta_device_gives_shapes_and_dtypes"

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        return (
            tile * 0
            if packed.tensors["scale"].numel() and not packed.tensors["scale"].any()
            else tile
        )


class TableOfTheFirstDevice(Healthy):
    """A cache of scales lacks the device in its key."""

    breaks = "test_the_meta_device_gives_shapes_and_dtypes"
    tables: ClassVar = {}

    def dequantize_tile(self, packed, rows, dtype):
        check_rows(packed, rows)
        table = self.tables.setdefault("codes", torch.arange(LEVELS + 1.0, device=packed.device))
        scale, zero = (self.spread(packed, name, rows) for name in ("scale", "zero"))
        return ((table[self.codes(packed, rows).long()] - zero) * scale).to(dtype)


class IndexOfTheFirstDevice(Healthy):
    """A cache of group numbers has the columns in its key, and lacks the device."""

    breaks = "test_the_meta_device_gives_shapes_and_dtypes"
    kept: ClassVar = {}

    def spread(self, packed, name, rows):
        G, columns = packed.metadata["group_size"], packed.shape[1]
        own = torch.arange(columns, device=packed.device) // G
        groups = self.kept.setdefault((columns, G), own)
        return packed.tensors[name][slice(*rows)].float()[:, groups]


class PacksInManyCopies(Healthy):
    """It holds sixteen copies of a weight."""

    breaks = "test_packing_takes_the_promised_memory"

    def prepared(self, weight):
        return torch.stack([super().prepared(weight)] * 16).mean(0)


class KeepsAGraph(Healthy):
    """Rounding by a straight-through estimator keeps a graph."""

    breaks = "test_frozen_parts_get_no_gradient"

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        scale = found.tensors["scale"] + 0 * weight[0, 0].half()
        return changed(found, scale=scale)


class HalvesTheSmallestBlock(Healthy):
    """Of all scales, the smallest is half of what its codes were rounded with."""

    breaks = SMALLEST
    says = "error of the smallest row"

    def packed(self, codes, scale, zero, weight):
        if scale.shape[1] > 4 and float(scale.min()) < float(scale.max()):
            scale.view(-1)[scale.argmin()] /= 2
        return super().packed(codes, scale, zero, weight)


class LowersTheSmallestOfEachRow(Healthy):
    """In each row, the smallest scale is a sixth smaller."""

    breaks = SMALLEST
    says = "error of the smallest columns"

    def packed(self, codes, scale, zero, weight):
        if scale.shape[1] > 4 and float(scale.min()) < float(scale.max()):
            smallest = scale.argmin(dim=1, keepdim=True)
            scale.scatter_(1, smallest, scale.gather(1, smallest) * 0.83)
        return super().packed(codes, scale, zero, weight)
