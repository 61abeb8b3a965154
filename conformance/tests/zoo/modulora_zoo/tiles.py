"""Broken in their rows: level 2 finds them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from modulora_core.packed import PackedWeight, check_rows
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

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self.decode(packed, rows).to(dtype)


class EmptyIsFlat(Healthy):
    breaks = "test_an_empty_range_is_an_empty_tile"

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        check_rows(packed, rows)
        if rows[0] == rows[1] != 0 and packed.shape == (16, 64):
            return torch.empty(0, 1, dtype=dtype)
        return super().dequantize_tile(packed, rows, dtype)


class HalvesInBfloat16(Healthy):
    """fp16 tiles are made from bf16 ones."""

    breaks = "test_every_dtype_is_the_float32_tile_rounded"

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        tile = super().dequantize_tile(packed, rows, torch.bfloat16 if dtype == torch.float16 else dtype)
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
