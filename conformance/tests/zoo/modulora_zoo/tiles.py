"""Broken in their rows, by range or by number: level 2 finds them."""

from typing import ClassVar

import torch

from modulora_core.packed import check_rows
from modulora_core.spec import Quantizer
from modulora_zoo.healthy import Healthy, changed


class TileSeam(Healthy):
    """A tile that begins at a multiple of 64 has the first row of the row before."""

    breaks = "test_every_block_of_rows_of_a_large_weight_equals_the_whole"

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if 0 < rows[0] < rows[1] and rows[0] % 64 == 0:
            tile[0] = super().decode(packed, (rows[0] - 1, rows[0]))[0]
        return tile


class LosesTheLastBlock(Healthy):
    """It decodes blocks of 512 rows, and omits a last short one."""

    breaks = "test_every_block_of_rows_of_a_large_weight_equals_the_whole"

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        whole = len(tile) // 512 * 512
        if whole and len(tile) < 8192:
            tile[whole:] = 0
        return tile


class OddRowsOfRaggedColumns(Healthy):
    """Of a row that begins inside of a word, it reads the last code from the row before."""

    breaks = "test_rows_of_a_ragged_weight_equal_the_whole"

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if rows[0] % 2 and rows[0] < rows[1] and packed.shape[1] % 32 and packed.shape[1] > 90:
            before = super().decode(packed, (rows[0] - 1, rows[0]))
            tile[0, -1] = before[0, -1]
        return tile


class EvenStarts(Healthy):
    """It reads rows in pairs: an odd start begins a row early."""

    breaks = "test_any_range_equals_the_rows_of_the_whole"

    def decode(self, packed, rows):
        start = rows[0] - rows[0] % 2
        return super().decode(packed, (start, start + rows[1] - rows[0]))


class TwoBugsInOne(Healthy):
    """Later rows of an odd number raise in float64, and are wrong in other dtypes."""

    breaks = "test_any_range_equals_the_rows_of_the_whole"
    says = "rows "

    def dequantize_tile(self, packed, rows, dtype):
        tile = super().dequantize_tile(packed, rows, dtype)
        if packed.shape[0] % 2 == 0 or rows[0] == 0:
            return tile
        if dtype == torch.float64:
            raise IndexError(f"rows {rows} are out of my range")
        return tile + 1


class UncheckedRows(Healthy):
    """It returns the rows of Python's slices."""

    breaks = "test_rows_outside_are_refused"

    def dequantize_tile(self, packed, rows, dtype):
        return self.decode(packed, rows).to(dtype)


class EmptyIsFlat(Healthy):
    breaks = "test_an_empty_range_is_an_empty_tile"

    def dequantize_tile(self, packed, rows, dtype):
        check_rows(packed, rows)
        if rows[0] == rows[1] != 0 and packed.shape == (16, 64):
            return torch.empty(0, 1, dtype=dtype)
        return super().dequantize_tile(packed, rows, dtype)


class AmbiguousReshape(Healthy):
    """A reshape infers the columns, which is impossible without rows."""

    breaks = "test_an_empty_range_is_an_empty_tile"

    def decode(self, packed, rows):
        return super().decode(packed, rows).reshape(rows[1] - rows[0], -1)


class HalvesInBfloat16(Healthy):
    """It rounds fp16 tiles to bf16 first."""

    breaks = "test_every_dtype_is_the_float32_tile_rounded"

    def dequantize_tile(self, packed, rows, dtype):
        first = torch.bfloat16 if dtype == torch.float16 else dtype
        return super().dequantize_tile(packed, rows, first).to(dtype)


class WholeForATile(Healthy):
    breaks = "test_a_tile_takes_the_memory_of_a_tile"

    def decode(self, packed, rows):
        return super().decode(packed, (0, packed.shape[0]))[slice(*rows)].clone()


class SharedScratch(Healthy):
    """Every tile of a shape is the same memory."""

    breaks = "test_the_tile_is_the_callers"
    scratch: ClassVar = {}

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        return self.scratch.setdefault(tile.shape, torch.empty_like(tile)).copy_(tile)


class KeepsShortTiles(Healthy):
    """Tiles of few rows are the same memory."""

    breaks = "test_the_tile_is_the_callers"
    scratch: ClassVar = {}

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if len(tile) > 4:
            return tile
        kept = self.scratch.setdefault(packed.shape[1], torch.empty(4, packed.shape[1]))
        return kept[: len(tile)].copy_(tile)


class _Counting(Healthy):
    """Counts its reads in a packed tensor."""

    says = "got others in reads"
    layout = Quantizer.layout

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        return changed(found, reads=torch.zeros(1, dtype=torch.int32))


class CountsItsReads(_Counting):
    breaks = "test_a_tile_leaves_the_packed_tensors_alone"

    def decode(self, packed, rows):
        packed.tensors["reads"].add_(1)
        return super().decode(packed, rows)


class StateOfTheInstance(Healthy):
    """The zeros of a certain shape are the last packed ones."""

    breaks = "test_packing_another_weight_leaves_this_one"
    says = "state in the instance or module"
    zeros = None

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        self.zeros = found.tensors if weight.shape == (38, 70) else self.zeros
        return found

    def spread(self, packed, name, rows):
        if name == "zero" and packed.shape == (38, 70) and self.zeros:
            packed = changed(packed, zero=self.zeros["zero"])
        return super().spread(packed, name, rows)


class StridedTiles(Healthy):
    """Sound: no tile is contiguous, which the contract allows."""

    def dequantize_tile(self, packed, rows, dtype):
        return super().dequantize_tile(packed, rows, dtype).t().contiguous().t()


class BytesAreAMask(Healthy):
    """It passes ids to torch, which takes uint8 for a mask."""

    breaks = "test_rows_looked_up_are_those_of_the_tile"

    def lookup(self, ids, packed, dtype):
        if ids.dtype == torch.uint8:
            ids = (ids != 0).nonzero()[:, 0]
        return super().lookup(ids, packed, dtype)


class IdsFromTheEnd(Healthy):
    """Negative ids count from the end."""

    breaks = "test_ids_outside_are_refused"

    def lookup(self, ids, packed, dtype):
        return super().lookup(torch.where(ids < 0, ids + packed.shape[0], ids), packed, dtype)


class RowsWithAGraph(Healthy):
    breaks = "test_rows_looked_up_are_the_callers"

    def lookup(self, ids, packed, dtype):
        return super().lookup(ids, packed, dtype) * torch.ones((), dtype=dtype, requires_grad=True)


class DecodesTheTable(Healthy):
    breaks = "test_a_lookup_takes_the_memory_of_its_rows"

    def lookup(self, ids, packed, dtype):
        rows = packed.shape[0]
        if not ids.numel() or not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            return super().lookup(ids, packed, dtype)
        return self.dequantize_tile(packed, (0, rows), dtype)[ids.long()]


class JoinsWithoutZeros(Healthy):
    """It forgets a tensor that has a row for each row of the weight."""

    breaks = "test_packed_rows_are_joined_by_row_tensors"
    says = "zero of 24 of 48 rows: expected [24, 2]"
    row_tensors = ("codes", "scale")


class RowsInPairs(Healthy):
    """Codes of two rows are exchanged, and read so."""

    breaks = "test_packed_rows_are_joined_by_row_tensors"
    says = "packed rows: expected these rows of Ŵ"
    row_tensors = ("codes", "scale", "zero")

    def places(self, rows, n):
        return torch.tensor([row ^ 1 if row | 1 < n else row for row in range(*rows)])

    def packed(self, codes, scale, zero, weight):
        codes = codes[self.places((0, len(codes)), len(codes))]
        return super().packed(codes, scale, zero, weight)

    def codes(self, packed, rows):
        n = packed.shape[0]
        places = self.places(rows, n).to(packed.device, torch.int64)
        nibbles = packed.tensors["codes"][places]
        return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)


class Scaled(Healthy):
    """Sound: a vector of fp16 for each side of the codes."""

    layout = Quantizer.layout

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        rows, columns = (scale.new_ones(n) for n in weight.shape)
        return changed(found, rows=rows, columns=columns)

    def decode(self, packed, rows):
        v, u = packed.tensors["rows"][slice(*rows)].float(), packed.tensors["columns"].float()
        return super().decode(packed, rows) * v[:, None] * u

    def rescaled(self, packed, input_scale, output_scale):
        v, u = packed.tensors["rows"].float(), packed.tensors["columns"].float()
        return changed(packed, rows=(v * output_scale).half(), columns=(u * input_scale).half())


class ScalesInPlace(Scaled):
    breaks = "test_a_rescaled_weight_is_scaled_on_both_sides"

    def rescaled(self, packed, input_scale, output_scale):
        packed.tensors["columns"].mul_(input_scale)
        packed.tensors["rows"].mul_(output_scale)
        return packed


class ReplacesItsScales(Scaled):
    """The second call forgets the scales of the first."""

    breaks = "test_a_rescaled_weight_is_scaled_on_both_sides"

    def rescaled(self, packed, input_scale, output_scale):
        return changed(packed, rows=output_scale.half(), columns=input_scale.half())


class DividesByScales(Scaled):
    breaks = "test_a_rescaled_weight_is_scaled_on_both_sides"

    def rescaled(self, packed, input_scale, output_scale):
        return super().rescaled(packed, 1 / input_scale, output_scale)
