"""Broken between processes: level 6 finds them."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core.packed import PackedLayout, PackedWeight, TensorLayout
from modulora_zoo.healthy import Healthy
from modulora_zoo.packing import signs


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
        return (
            tile
            if packed.format == 1
            else tile + self.spread(packed, "scale", rows, packed.shape[1])
        )


class Unpickles(Healthy):
    """Its metadata goes through pickle."""

    breaks = "test_nothing_is_unpickled"

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        pickle.loads(pickle.dumps(dict(packed.metadata)))
        return super().dequantize_tile(packed, rows, dtype)


class SeedOfThisProcess(Healthy):
    """Dithers by the process's id."""

    breaks = "test_another_process_packs_the_same_bytes"

    def rounding(self, groups: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(os.getpid())
        return 0.5 + 0.02 * (torch.rand(groups.shape, generator=generator) - 0.5)


class HashOfItsName(Healthy):
    """Dithers by the hash of a text."""

    breaks = "test_another_process_packs_the_same_bytes"

    def rounding(self, groups: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(abs(hash(self.spec.name)))
        return 0.5 + 0.02 * (torch.rand(groups.shape, generator=generator) - 0.5)


class _Signed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(32, ge=2, description="weights that share a scale")
    negated: bool = Field(False, description="whether the first sign is turned")
    seed: int = Field(0, ge=0, description="of the signs")


class SignsByGroupSize(Healthy):
    """Keeps the signs that it turns back by group size and columns, without the seed."""

    breaks = "test_options_keep_apart"
    kept: ClassVar[dict[tuple[int, int], Tensor]] = {}
    Options = _Signed

    def prepared(self, weight: Tensor) -> Tensor:
        return super().prepared(weight) * signs(self.options.seed, weight.shape[1])

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        key = (self.options.group_size, packed.shape[1])
        return super().decode(packed, rows) * self.kept.setdefault(
            key, signs(self.options.seed, key[1])
        )
