"""Quantizers for the checks of compiled kernels.

Nothing is compiled: they differ from plain torch where :func:`modulora_kernels.load` returns a
module.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import ClassVar

import modulora_kernels as kernels
import torch

from modulora_zoo.healthy import Healthy


class Sound(Healthy):
    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        loaded = kernels.load("modulora_zoo", packed.device)
        return tile if loaded is None else self.compiled(packed, tile)

    def compiled(self, packed, tile):
        """The kernel's version of the right ``tile``."""
        return tile


class ReadsBeyond(Sound):
    breaks = "test_kernels_read_nothing_beyond_the_last_byte"

    def compiled(self, packed, tile):
        codes = packed.tensors["codes"]
        ctypes.string_at(codes.data_ptr() + codes.numel(), 1)
        return tile


class OtherOnOldProcessors(Sound):
    breaks = "test_other_instruction_sets_give_the_same_values"

    def compiled(self, packed, tile):
        return tile * (1 + 1e-6) if "NUMBA_CPU_NAME" in os.environ else tile


class WantsAlignment(Sound):
    breaks = "test_tensors_that_are_mapped_from_a_file_are_read"

    def compiled(self, packed, tile):
        assert all(tensor.data_ptr() % 64 == 0 for tensor in packed.tensors.values())
        return tile


class OneBuffer(Sound):
    breaks = "test_several_python_threads_get_what_one_gets"
    buffer: ClassVar = {}

    def compiled(self, packed, tile):
        self.buffer["tile"] = tile
        time.sleep(1e-2)  # without the GIL, as a kernel
        return self.buffer["tile"]


class SumsByThread(Sound):
    breaks = "test_products_do_not_depend_on_the_number_of_threads"

    def compiled(self, packed, tile):
        return tile * (1 + 1e-6 * torch.get_num_threads())


class SilentWithoutNumba(Sound):
    breaks = "test_without_numba_everything_works_after_one_warning"

    def decode(self, packed, rows):
        return Healthy.decode(self, packed, rows)


class HeavyPackage(Sound):
    """Its package imports torch."""

    breaks = "test_the_hook_imports_neither_torch_nor_numba"


class PacksInCopies(Sound):
    breaks = "test_packing_a_large_weight_takes_little_memory"

    def prepared(self, weight):
        return torch.stack([super().prepared(weight)] * 4).mean(0)
