"""Broken where rows are looked up by their numbers: level 2 finds them."""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_zoo.healthy import Healthy


class BytesAreAMask(Healthy):
    """Hands the ids to torch as they are, which takes uint8 for a mask."""

    breaks = "test_rows_looked_up_are_those_of_the_tile"

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        if ids.dtype != torch.uint8:
            return super().lookup(ids, packed, dtype)
        mask = (ids != 0).nonzero()[:, 0]
        return super().lookup(mask, packed, dtype)


class IdsFromTheEnd(Healthy):
    """Negative ids count from the end, as Python's do."""

    breaks = "test_ids_outside_are_refused"

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        return super().lookup(torch.where(ids < 0, ids + packed.shape[0], ids), packed, dtype)


class RowsWithAGraph(Healthy):
    """Multiplies by a constant of its own that requires a gradient."""

    breaks = "test_rows_looked_up_are_the_callers"

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        return super().lookup(ids, packed, dtype) * torch.ones((), dtype=dtype, requires_grad=True)


class DecodesTheTable(Healthy):
    """Decodes the whole table and takes rows of it."""

    breaks = "test_a_lookup_takes_the_memory_of_its_rows"

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        if not ids.numel() or not 0 <= int(ids.min()) <= int(ids.max()) < packed.shape[0]:
            return super().lookup(ids, packed, dtype)
        return self.dequantize_tile(packed, (0, packed.shape[0]), dtype)[ids.long()]
