"""Broken between processes: level 6 finds them."""

from __future__ import annotations

import os
import pickle
import random
from typing import ClassVar

import torch
from pydantic import Field

from modulora_core.spec import Quantizer
from modulora_zoo.healthy import Healthy, _Options, changed
from modulora_zoo.packing import signs


class SharesMemory(Healthy):
    """Two packed tensors share memory, which safetensors refuses."""

    breaks = "test_packed_tensors_and_layout_round_trip_bit_for_bit"
    layout = Quantizer.layout

    def packed(self, codes, scale, zero, weight):
        return changed(super().packed(codes, scale, zero, weight), again=scale)


class TableOfThisProcess(Healthy):
    breaks = "test_another_process_reads_the_same_weight"
    factor = 1 + random.SystemRandom().random()

    def packed(self, codes, scale, zero, weight):
        return super().packed(codes, (scale.float() / self.factor).half(), zero, weight)

    def decode(self, packed, rows):
        return super().decode(packed, rows) * self.factor


class SeedOfThisProcess(Healthy):
    breaks = "test_another_process_packs_the_same_bytes"

    def seed(self):
        return os.getpid()

    def rounding(self, groups):
        generator = torch.Generator().manual_seed(self.seed())
        return 0.5 + 0.02 * (torch.rand(groups.shape, generator=generator) - 0.5)


class HashOfItsName(SeedOfThisProcess):
    def seed(self):
        return abs(hash(self.spec.name))


class SignsByGroupSize(Healthy):
    """The key of its cache of signs lacks the seed."""

    breaks = "test_options_keep_apart"
    kept: ClassVar = {}

    class Options(_Options):
        negated: bool = Field(False, description="whether the first sign is turned")
        seed: int = Field(0, ge=0, description="of the signs")

    def prepared(self, weight):
        return super().prepared(weight) * signs(self.options.seed, weight.shape[1])

    def decode(self, packed, rows):
        key = (self.options.group_size, packed.shape[1])
        kept = self.kept.setdefault(key, signs(self.options.seed, packed.shape[1]))
        return super().decode(packed, rows) * kept


class ReadsAnyFormat(Healthy):
    """It misreads an unknown format."""

    breaks = "test_another_format_is_refused_or_migrated"

    def check_format(self, packed):
        return

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        return tile if packed.format == 1 else tile + self.spread(packed, "scale", rows)


class Unpickles(Healthy):
    breaks = "test_nothing_is_unpickled"

    def dequantize_tile(self, packed, rows, dtype):
        pickle.loads(pickle.dumps(dict(packed.metadata)))
        return super().dequantize_tile(packed, rows, dtype)
