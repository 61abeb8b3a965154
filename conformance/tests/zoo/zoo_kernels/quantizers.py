"""What is compiled here is nothing: it is told apart from plain torch by where :func:`modulora_core.kernels.load` leads."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any, ClassVar

import torch
from modulora_zoo.healthy import Healthy
from torch import Tensor

from modulora_core import kernels
from modulora_core.packed import PackedWeight
from zoo_kernels import SPECS


class Sound(Healthy):
    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls.spec = SPECS[cls.__name__]

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        tile = super().decode(packed, rows)
        compiled = kernels.load("zoo_kernels.nothing", packed.device)
        return tile if compiled is None else self.compiled(packed, tile)

    def compiled(self, packed: PackedWeight, tile: Tensor) -> Tensor:
        """What the kernel makes of the right ``tile``."""
        return tile


Sound.spec = SPECS["Sound"]


class ReadsBeyond(Sound):
    def compiled(self, packed: PackedWeight, tile: Tensor) -> Tensor:
        codes = packed.tensors["codes"]
        ctypes.string_at(codes.data_ptr() + codes.numel(), 1)
        return tile


class OtherOnOldProcessors(Sound):
    def compiled(self, packed: PackedWeight, tile: Tensor) -> Tensor:
        return tile * (1 + 1e-6) if "NUMBA_CPU_NAME" in os.environ else tile


class WantsAlignment(Sound):
    def compiled(self, packed: PackedWeight, tile: Tensor) -> Tensor:
        assert all(tensor.data_ptr() % 64 == 0 for tensor in packed.tensors.values())
        return tile


class OneBuffer(Sound):
    buffer: ClassVar[dict[str, Any]] = {}

    def compiled(self, packed: PackedWeight, tile: Tensor) -> Tensor:
        self.buffer["tile"] = tile
        time.sleep(1e-3)  # without the GIL, as a kernel is
        found: Tensor = self.buffer["tile"]
        return found


class SumsByThread(Sound):
    def compiled(self, packed: PackedWeight, tile: Tensor) -> Tensor:
        return tile * (1 + 1e-6 * torch.get_num_threads())


class SilentWithoutNumba(Sound):
    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        return Healthy.decode(self, packed, rows)


class PacksInCopies(Sound):
    def prepared(self, weight: Tensor) -> Tensor:
        return torch.stack([super().prepared(weight)] * 4).mean(0)
