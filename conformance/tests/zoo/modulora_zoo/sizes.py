"""Broken from a size on that the source names, and no fixed size meets; or at drawn ones."""

import torch

from modulora_zoo.healthy import Healthy, rows_of
from modulora_zoo.state import Importance

NAMED = "test_sizes_that_the_plugin_names_change_nothing"
DRAWN = "test_sizes_drawn_anew_change_nothing"
SWITCH = 6 * 1000


class OtherFrom6000Rows(Healthy):
    breaks, says = NAMED, "6000 rows"

    def matmul(self, x, packed, transpose=False):
        y = Healthy.matmul(self, x, packed, transpose)
        return y if rows_of(x) < SWITCH else y * 1.01


class OmitsTheLastOf5000Columns(Healthy):
    breaks = NAMED

    def decode(self, packed, rows):
        W = Healthy.decode(self, packed, rows)
        if packed.shape[1] // 5000:
            W[:, -1] = 0
        return W

    def matmul(self, x, packed, transpose=False):
        return Healthy.matmul(self, x, packed, transpose) * (1 + packed.shape[1] // 5000)


class LastRowOf7000Twice(Healthy):
    breaks, says = NAMED, "other bits"

    def lookup(self, ids, packed, dtype):
        bounded = ids.clamp(max=min(packed.shape[0], 7000) - 1)
        return Healthy.lookup(self, bounded, packed, dtype)


class RowsOf5000Ids(Healthy):
    breaks, says = NAMED, "ids"

    def lookup(self, ids, packed, dtype):
        found = Healthy.lookup(self, ids, packed, dtype)
        return torch.zeros_like(found) if ids.numel() == 5001 else found


class WrongAt1900Calls(Healthy):
    breaks, says = NAMED, "call 19"

    def lookup(self, ids, packed, dtype):
        seen = vars(self)["calls"] = vars(self).get("calls", 0) + 1
        found = Healthy.lookup(self, ids, packed, dtype)
        return -found if seen == 1900 else found


class CoarseFrom3000Samples(Importance):
    breaks, says = NAMED, "samples"

    def pack(self, weight, calibration=None):
        if calibration is not None and calibration.samples >= 3000:
            weight = weight.sign() * weight.abs().mean()
        return Importance.pack(self, weight, calibration)


class OtherForStridesOnManyThreads(Healthy):
    breaks = DRAWN

    def matmul(self, x, packed, transpose=False):
        y = Healthy.matmul(self, x, packed, transpose)
        odd = torch.get_num_threads() in (2, 3, 8, 16) and not x.is_contiguous()
        return y * 1.5 if odd and x.dtype is not torch.float32 else y
