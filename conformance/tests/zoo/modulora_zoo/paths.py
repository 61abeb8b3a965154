"""Broken on other devices, in protected memory, without numba, or by their own options."""

import ctypes
import sys

import torch

from modulora_zoo.healthy import Healthy, changed

ONLY_READ = "test_packed_tensors_are_only_read"
BESIDE = "test_nothing_beside_the_tensors_is_read"
OPTIONS = "test_an_instance_with_other_options_reads_the_same"
VALUES = "test_a_device_without_kernels_gives_the_values_of_the_cpu"
THERE = "test_a_weight_on_another_device_is_packed_there"
NUMBA = "test_without_numba_the_values_are_the_same"


class WritesTheSameScales(Healthy):
    breaks = ONLY_READ

    def decode(self, packed, rows):
        packed.tensors["scale"].mul_(1)
        return super().decode(packed, rows)


class WritesTheSameInput(Healthy):
    breaks = ONLY_READ

    def matmul(self, x, packed, transpose=False):
        if type(x) is torch.Tensor and x.dtype == torch.float32 and x.is_cpu:
            values = x.detach().numpy()  # torch counts no write
            values[...] = values.copy()
        return super().matmul(x, packed, transpose)


class _Reads(Healthy):
    breaks = BESIDE

    def decode(self, packed, rows):
        codes = packed.tensors["codes"]
        if packed.shape[1] == 576 and type(codes) is torch.Tensor and codes.is_cpu:
            ctypes.string_at(codes.data_ptr() + self.offset(codes), 1)
        return super().decode(packed, rows)


class ReadsAByteMore(_Reads):
    def offset(self, codes):
        return codes.nbytes


class ReadsAByteBefore(_Reads):
    def offset(self, codes):
        return -1


class ReadsBesideItsInput(Healthy):
    """It reads four bytes beyond x."""

    breaks = BESIDE

    def matmul(self, x, packed, transpose=False):
        if type(x) is torch.Tensor and x.is_cpu and x.is_contiguous() and packed.shape[1] == 576:
            ctypes.string_at(x.data_ptr() + x.nbytes, 4)
        return super().matmul(x, packed, transpose)


class GroupsOfItsOptions(Healthy):
    """It reads groups of the size in its own options."""

    breaks = OPTIONS

    def spread(self, packed, name, rows):
        size = self.options.group_size
        return super().spread(changed(packed, {"group_size": size}), name, rows)


class NoZerosOnCuda(Healthy):
    breaks = VALUES

    def spread(self, packed, name, rows):
        values = super().spread(packed, name, rows)
        return values.round() if packed.device.type == "cuda" and name == "zero" else values


class ReversesLookupsOnCuda(Healthy):
    breaks = VALUES

    def lookup(self, ids, packed, dtype):
        rows = super().lookup(ids, packed, dtype)
        return rows.flip(-2) if packed.device.type == "cuda" else rows


class PacksOnTheCpu(Healthy):
    breaks = THERE

    def pack(self, weight, calibration=None):
        return super().pack(weight.cpu() if weight.device.type == "cuda" else weight)


class CoarseOnCuda(Healthy):
    """On CUDA it packs with scales that are too large."""

    breaks = THERE

    def limits(self, groups):
        low, high = super().limits(groups)
        return (4 * low, 4 * high) if groups.device.type == "cuda" else (low, high)


def _without_numba():
    return sys.modules.get("numba", "not imported") is None


class OtherWithoutNumba(Healthy):
    breaks = NUMBA

    def decode(self, packed, rows):
        return super().decode(packed, rows) * (1.001 if _without_numba() else 1)


class NeedsNumbaToPack(Healthy):
    breaks = NUMBA

    def pack(self, weight, calibration=None):
        if _without_numba():
            raise ImportError("No module named 'numba'")
        return super().pack(weight, calibration)
