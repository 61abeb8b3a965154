"""Quantizers for the checks of compiled kernels.

Nothing is compiled: they differ from plain torch where :func:`modulora_kernels.load` returns a
module.
"""

import ctypes
import os

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


class SumsByThread(Sound):
    breaks = "test_products_do_not_depend_on_the_number_of_threads"

    def compiled(self, packed, tile):
        return tile * (1 + 1e-6 * torch.get_num_threads())


class PacksInCopies(Sound):
    breaks = "test_packing_a_large_weight_takes_little_memory"

    def prepared(self, weight):
        return torch.stack([super().prepared(weight)] * 4).mean(0)
