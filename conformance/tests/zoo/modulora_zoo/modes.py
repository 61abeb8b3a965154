"""Broken in a mode of torch or on some threads: level 3 finds them."""

import multiprocessing
import threading
from typing import ClassVar

import torch

from modulora_zoo.healthy import LEVELS, Healthy, _ChangesProducts, meet, rows_of

MODE = "test_a_mode_of_torch_changes_nothing"
THREADS = "test_any_number_of_threads_gives_the_same"
TOGETHER = "test_two_threads_multiply_many_rows"
FIRST = "test_two_threads_may_be_the_first_to_read"


class CoarseInInferenceMode(_ChangesProducts):
    breaks = MODE

    def product(self, y, x, packed, transpose):
        coarse = torch.is_inference_mode_enabled() and rows_of(x) > 100
        return y.bfloat16().to(y.dtype) if coarse else y


class OtherIfDeterministic(_ChangesProducts):
    breaks = MODE

    def product(self, y, x, packed, transpose):
        if torch.are_deterministic_algorithms_enabled() and transpose:
            y = y * 1.02
        return y


class BackwardUnderAutocast(_ChangesProducts):
    """Under autocast the transposed product is in autocast's dtype."""

    breaks = MODE

    def product(self, y, x, packed, transpose):
        autocast = torch.is_autocast_enabled("cpu") and transpose
        return y.to(torch.get_autocast_dtype("cpu")) if autocast else y


class TableOnTheDefaultDevice(Healthy):
    breaks = MODE

    def decode(self, packed, rows):
        table = torch.arange(LEVELS + 1, dtype=torch.float32).to(packed.device)
        scale, zero = (self.spread(packed, name, rows) for name in ("scale", "zero"))
        return (table[self.codes(packed, rows).long()] - zero) * scale


class RoundsLookupsWithoutGrad(Healthy):
    breaks = MODE

    def lookup(self, ids, packed, dtype):
        rows = super().lookup(ids, packed, dtype)
        return rows if torch.is_grad_enabled() else rows.bfloat16().to(dtype)


class RestOf8Threads(_ChangesProducts):
    """Eight threads leave the outputs that they do not divide."""

    breaks = THREADS

    def product(self, y, x, packed, transpose):
        rest = y.shape[-1] % 8 if y.dim() else 0
        if torch.get_num_threads() == 8 and rest:
            y[..., -rest:] = 0
        return y


class TileOf16Threads(Healthy):
    breaks = THREADS

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if torch.get_num_threads() == 16 and len(tile) > 16:
            tile[-1] = tile[0]
        return tile


class OneScratchForManyRows(Healthy):
    """More than 512 rows of x are held in the instance meanwhile."""

    breaks = TOGETHER

    def matmul(self, x, packed, transpose=False):
        if rows_of(x) != 640:
            return super().matmul(x, packed, transpose)
        self.held = packed
        meet(self)
        return super().matmul(x, self.held, transpose)


class TableBeforeItIsFilled(Healthy):
    """The cache has a table of zeros while it is filled."""

    breaks = FIRST
    table: ClassVar = {}

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if multiprocessing.parent_process() is None:  # other checks of threads find it there
            return tile
        me = threading.get_ident()
        is_full = self.table.get("full", self.table.setdefault("filled by", me) == me)
        meet(self)
        self.table["full"] = True
        return tile if is_full else 0 * tile
