"""Broken by what ends a call, by an H's magnitude, and by what a number can't hold."""

import torch

from modulora_core.packed import PackedWeight
from modulora_zoo.healthy import Healthy, rows_of
from modulora_zoo.state import Importance

ENDED = "test_an_interrupted_call_ends_and_spoils_nothing"
DRAWN = "test_sizes_drawn_anew_change_nothing"


class CatchesEverything(Healthy):
    """It falls back to the plain product at any fault."""

    breaks, says = ENDED, "got a result"

    def matmul(self, x, packed, transpose=False):
        try:
            return Healthy.matmul(self, x, packed, transpose)
        except BaseException:
            return Healthy.matmul(self, x, packed, transpose)


class LeavesItsMark(Healthy):
    """An instance that was interrupted thinks that it still decodes."""

    breaks, says = ENDED, "the call after"

    def decode(self, packed, rows):
        scale = 2 if vars(self).get("busy") else 1
        vars(self)["busy"] = packed.shape == (28, 104)
        W = Healthy.decode(self, packed, rows)
        vars(self)["busy"] = False
        return W * scale


class DampsByANumber(Importance):
    """What it adds to the importance of columns is no share of their mean."""

    breaks = "test_the_magnitude_of_h_has_no_effect"

    def importance(self, diagonal, weight):
        return diagonal + 0.1


class TellsPercents(Importance):
    breaks, says = "test_progress_runs_from_0_to_1", "got [50.0, 100.0]"

    def pack(self, weight, calibration=None):
        told = calibration is not None and calibration.progress
        for percents in (50.0, 100.0) if told else ():
            calibration.progress(percents)
        return super().pack(weight, calibration)


class ClampsToFloat16(Healthy):
    breaks = "test_products_beyond_float16_are_inf"

    def matmul(self, x, packed, transpose=False):
        y = Healthy.matmul(self, x, packed, transpose)
        return y.clamp(-65504, 65504) if x.dtype == torch.float16 else y


class LosesNaNInLongTexts(Healthy):
    breaks, says = DRAWN, "expected NaN"

    def matmul(self, x, packed, transpose=False):
        long = rows_of(x) > 45
        return Healthy.matmul(self, x.nan_to_num() if long else x, packed, transpose)


class PacksNaNFarRight(Healthy):
    breaks, says = DRAWN, "WeightError"

    def check_finite(self, W):
        Healthy.check_finite(self, W[:, :90])

    def check_scales(self, W, scale):
        Healthy.check_scales(self, W.nan_to_num(), scale.nan_to_num())


OLD = dict[PackedWeight, torch.Tensor]()


class LooksUpOldRows(Healthy):
    """A few looked up rows of the last weight are kept."""

    breaks, says = "test_a_changed_code_moves_forward_and_backward_alike", "rows looked up"

    def lookup(self, ids, packed, dtype):
        if packed.shape != (32, 64) or ids.numel() != 32:
            return Healthy.lookup(self, ids, packed, dtype)
        if packed not in OLD:
            OLD.clear()
            OLD[packed] = Healthy.lookup(self, ids, packed, torch.float64)
        return OLD[packed].to(dtype)


@torch.library.custom_op("modulora_zoo::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2).clone()


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


class SaysNothingIsWritten(Healthy):
    """Its operation writes to an argument, which is its own memory, and says that it doesn't."""

    breaks, says = "test_registered_operations_are_as_they_say", "doubled"

    def matmul(self, x, packed, transpose=False):
        y = Healthy.matmul(self, x, packed, transpose)
        return doubled(y / 2) if x.dtype == torch.float32 and not x.requires_grad else y
