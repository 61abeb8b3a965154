"""Broken between processes: level 6 finds them."""

import ctypes
import multiprocessing
import os
import pickle
import random
from typing import ClassVar, Literal

import torch
from pydantic import Field

from modulora_core.spec import Quantizer
from modulora_zoo.healthy import Healthy, _Options, changed
from modulora_zoo.packing import signs

CRAFTED = "test_crafted_tensors_are_refused_or_read_in_bounds"


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
        noise = torch.rand(groups.shape, generator=generator, dtype=torch.float32)
        return 0.5 + 0.02 * (noise - 0.5)


class HashOfItsName(SeedOfThisProcess):
    def seed(self):
        return abs(hash(self.spec.name))


class PrefersAnotherTensor(Healthy):
    """A file with one tensor more, of any size, is read in another way."""

    breaks = CRAFTED
    says = "with a tensor surplus of one element: expected an error"

    def decode(self, packed, rows):
        return super().decode(packed, rows) * packed.tensors.get("surplus", torch.tensor(2.0)) / 2


class TrustsItsIndices(Healthy):
    """Each row of codes has an index, as after a sort, and nobody checks it."""

    breaks = CRAFTED
    says = "expected another process to do the same work, got an end"
    layout = Quantizer.layout

    def packed(self, codes, scale, zero, weight):
        places = torch.arange(weight.shape[0], dtype=torch.int32)
        return changed(super().packed(codes, scale, zero, weight), places=places)

    def codes(self, packed, rows):
        if packed.device.type == "meta":
            return super().codes(packed, rows)
        codes, places = packed.tensors["codes"].contiguous(), packed.tensors["places"]
        width = codes.shape[1]
        read = [
            ctypes.string_at(codes.data_ptr() + place * width, width)
            for place in places[slice(*rows)].tolist()
        ]
        nibbles = torch.tensor([*map(list, read)], dtype=torch.uint8).view(-1, width)
        return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)


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
        return super().decode(packed, rows) * kept.to(packed.device)


class SignsByColumns(Healthy):
    """The key of its cache of signs lacks the only option besides the size of a block."""

    breaks = "test_options_keep_apart"
    kept: ClassVar = {}

    class Options(_Options):
        group_size: Literal[32] = Field(32, description="as in the paper")
        order: Literal["plain", "turned"] = Field("plain", description="of the signs")

    def signs(self, columns):
        return signs(("plain", "turned").index(self.options.order), columns)

    def prepared(self, weight):
        return super().prepared(weight) * self.signs(weight.shape[1])

    def decode(self, packed, rows):
        kept = self.kept.setdefault(packed.shape[1], self.signs(packed.shape[1]))
        return super().decode(packed, rows) * kept.to(packed.device)


class GroupOfTheModule(Healthy):
    """It reads with the default size of a block."""

    breaks = "test_other_options_are_read_as_they_were_packed"
    says = "error with an option changed (group_size=128)"

    def spread(self, packed, name, rows):
        return blocks(packed, name, rows, 32)


class LargestBlocks(Healthy):
    """It reads blocks of more than 100 weights as blocks of 64."""

    breaks = "test_other_options_are_read_as_they_were_packed"
    says = "error with an option changed (group_size=128)"

    def spread(self, packed, name, rows):
        size = packed.metadata["group_size"]
        return blocks(packed, name, rows, 64 if size > 100 else size)


def blocks(packed, name, rows, size):
    """A value of each block of ``size`` weights at each of its weights, fp32 ``[rows, in]``."""
    values = packed.tensors[name][slice(*rows)].float()
    block = (torch.arange(packed.shape[1]) // size).clamp(max=values.shape[1] - 1)
    return values[:, block.to(packed.device)]


class ThreadsOfItsModule(Healthy):
    """Importing its module sets the number of threads; here the first instance of a process."""

    breaks = "test_its_module_changes_no_settings"
    says = "expected the number of torch's threads unchanged"

    def __init__(self, options=None):
        if multiprocessing.parent_process() is not None:
            torch.set_num_threads(3)
        super().__init__(options)


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
