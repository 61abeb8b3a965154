"""Broken in their rows: level 2 finds them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from modulora_core.packed import PackedLayout, PackedWeight, TensorLayout, check_rows
from modulora_zoo.healthy import Healthy


class TileSeam(Healthy):
    """The first row of every block of 64 but the first takes its scale from the row before, if the range starts there."""

    breaks = "test_every_block_of_rows_of_a_large_weight_equals_the_whole"

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        tile = super().decode(packed, rows)
        if 0 < rows[0] < rows[1] and rows[0] % 64 == 0:
            tile[0] = super().decode(packed, (rows[0] - 1, rows[0]))[0]
        return tile


class EvenStarts(Healthy):
    """Reads rows in pairs: an odd start begins a row early."""

    breaks = "test_any_range_equals_the_rows_of_the_whole"

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        start = rows[0] - rows[0] % 2
        return super().decode(packed, (start, start + rows[1] - rows[0]))


class UncheckedRows(Healthy):
    """Gives what Python's slices give."""

    breaks = "test_rows_outside_are_refused"

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return self.decode(packed, rows).to(dtype)


class EmptyIsFlat(Healthy):
    breaks = "test_an_empty_range_is_an_empty_tile"

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        if rows[0] == rows[1] != 0 and packed.shape == (16, 64):
            return torch.empty(0, 1, dtype=dtype)
        return super().dequantize_tile(packed, rows, dtype)


class HalvesInBfloat16(Healthy):
    """fp16 tiles are made from bf16 ones."""

    breaks = "test_every_dtype_is_the_float32_tile_rounded"

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        tile = super().dequantize_tile(
            packed, rows, torch.bfloat16 if dtype == torch.float16 else dtype
        )
        return tile.to(dtype)


class WholeForATile(Healthy):
    """Decodes the whole weight and gives a part."""

    breaks = "test_a_tile_takes_the_memory_of_a_tile"

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        return super().decode(packed, (0, packed.shape[0]))[slice(*rows)].clone()


class SharedScratch(Healthy):
    """Every tile of a shape is the same memory."""

    breaks = "test_the_tile_is_the_callers"
    scratch: ClassVar[dict[tuple[int, ...], Tensor]] = {}

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        tile = super().decode(packed, rows)
        return self.scratch.setdefault(tuple(tile.shape), torch.empty_like(tile)).copy_(tile)


class KeepsShortTiles(Healthy):
    """Tiles of few rows are the same memory every time."""

    breaks = "test_the_tile_is_the_callers"
    scratch: ClassVar[dict[int, Tensor]] = {}

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        tile = super().decode(packed, rows)
        if rows[1] - rows[0] > 4:
            return tile
        kept = self.scratch.setdefault(packed.shape[1], torch.empty(4, packed.shape[1]))
        return kept[: len(tile)].copy_(tile)


class CountsItsReads(Healthy):
    """Beside the codes it keeps how often they were read."""

    breaks = "test_a_tile_leaves_the_packed_tensors_alone"
    says = "got others in reads"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        return with_counter(super().packed(codes, scale, zero, weight))

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        return layout_with_counter(super().layout(shape))

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        packed.tensors["reads"].add_(1)
        return super().decode(packed, rows)


def with_counter(packed: PackedWeight) -> PackedWeight:
    tensors = {**packed.tensors, "reads": torch.zeros(1, dtype=torch.int32)}
    return PackedWeight(packed.quantizer, packed.format, packed.shape, tensors, packed.metadata)


def layout_with_counter(layout: PackedLayout) -> PackedLayout:
    return replace(layout, tensors={**layout.tensors, "reads": TensorLayout("int32", (1,))})


class StateOfTheInstance(Healthy):
    """The zeros of a certain shape are those that were packed last."""

    breaks = "test_packing_another_weight_leaves_this_one"
    says = "state in the instance or module"
    zeros: Tensor | None = None

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        if weight.shape == (38, 70):
            self.zeros = zero.float()
        return super().packed(codes, scale, zero, weight)

    def spread(
        self, packed: PackedWeight, name: str, rows: tuple[int, int], columns: int
    ) -> Tensor:
        values = super().spread(packed, name, rows, columns)
        if name == "scale" or packed.shape != (38, 70) or self.zeros is None:
            return values
        return self.zeros[slice(*rows)].repeat_interleave(self.options.group_size, dim=1)[
            :, :columns
        ]


class LosesTheLastBlock(Healthy):
    """Decodes blocks of 512 rows, and forgets the one that isn't whole, unless it is the first."""

    breaks = "test_every_block_of_rows_of_a_large_weight_equals_the_whole"

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        tile = super().decode(packed, rows)
        whole = len(tile) // 512 * 512
        if whole:
            tile[whole:] = 0
        return tile


class AmbiguousReshape(Healthy):
    """Leaves the columns to be found by the size, where there is none."""

    breaks = "test_an_empty_range_is_an_empty_tile"

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        return super().decode(packed, rows).reshape(rows[1] - rows[0], -1)


class TwoBugsInOne(Healthy):
    """Later rows of an odd number raise in float64, and are wrong in other dtypes."""

    breaks = "test_any_range_equals_the_rows_of_the_whole"
    says = "rows "

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        tile = super().dequantize_tile(packed, rows, dtype)
        if packed.shape[0] % 2 == 0 or rows[0] == 0:
            return tile
        if dtype == torch.float64:
            raise IndexError(f"rows {rows} are out of my range")
        return tile + 1


class StridedTiles(Healthy):
    """Nothing is wrong with it: no tile is contiguous, which nobody asked for."""

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return super().dequantize_tile(packed, rows, dtype).t().contiguous().t()
