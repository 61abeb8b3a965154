"""Broken between processes: level 6 finds them."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import torch
from torch import Tensor

from modulora_core.packed import PackedLayout, PackedWeight, TensorLayout
from modulora_zoo.healthy import Healthy


class SharesMemory(Healthy):
    """Two packed tensors in one memory: safetensors doesn't take them."""

    breaks = "test_packed_tensors_and_layout_round_trip_bit_for_bit"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        found = super().packed(codes, scale, zero, weight)
        tensors = {**found.tensors, "again": found.tensors["scale"]}
        return PackedWeight(found.quantizer, 1, found.shape, tensors, found.metadata)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        found = super().layout(shape)
        again: TensorLayout = found.tensors["scale"]
        return replace(found, tensors={**found.tensors, "again": again})


class TableOfThisProcess(Healthy):
    """Scales go through a table that each process makes anew."""

    breaks = "test_another_process_reads_the_same_weight"
    factor = 1 + random.SystemRandom().random()

    def scale(self, scale: Tensor) -> Tensor:
        return scale.half()

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        return super().packed(codes, (scale.float() / self.factor).half(), zero, weight)

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        return super().decode(packed, rows) * self.factor


class ReadsAnyFormat(Healthy):
    """Reads a format that it doesn't know as if zeros were counted from one."""

    breaks = "test_another_format_is_refused_or_migrated"

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        return

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        tile = super().decode(packed, rows)
        return tile if packed.format == 1 else tile + self.spread(packed, "scale", rows, packed.shape[1])


class Unpickles(Healthy):
    """Its metadata goes through pickle."""

    breaks = "test_nothing_is_unpickled"

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        pickle.loads(pickle.dumps(dict(packed.metadata)))
        return super().dequantize_tile(packed, rows, dtype)
