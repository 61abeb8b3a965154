"""Broken by what they leave in the process: output, files, settings of Python. Level 1 finds them.

Most do so for the one weight of the check: settings would disturb the run itself."""

import gc
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from modulora_zoo.healthy import Healthy

PACKING = "test_packing_leaves_global_state_alone"
READING = "test_reading_leaves_global_state_alone"


class _Leaves(Healthy):
    breaks = PACKING

    def prepared(self, weight):
        if len(weight) == 21:
            self.leave()
        return super().prepared(weight)


class PrintsItsProgress(_Leaves):
    says = "expected nothing on stdout"

    def leave(self):
        print("packing a weight")


class LeavesAFile(_Leaves):
    says = "expected no file in the current folder"

    def leave(self):
        Path("scales.tmp").write_text("1")


class StopsTheCollector(_Leaves):
    says = "expected Python's garbage collection unchanged"

    def leave(self):
        gc.disable()


class SetsAVariable(_Leaves):
    says = "expected the environment unchanged"

    def leave(self):
        os.environ["OMP_NUM_THREADS"] = "7"


class DisablesGradients(_Leaves):
    """It turns gradients off for the whole process."""

    says = "expected torch's gradient mode unchanged"

    def leave(self):
        torch.set_grad_enabled(False)


class SetsTheThreads(_Leaves):
    """It packs on one thread, and leaves the process so."""

    says = "expected the number of torch's threads unchanged"

    def leave(self):
        torch.set_num_threads(1)


class IgnoresErrors(_Leaves):
    """It turns numpy's warnings off."""

    says = "expected numpy's treatment of errors unchanged"

    def leave(self):
        np.seterr(all="ignore")


class HidesWarnings(Healthy):
    breaks = READING
    says = "expected the display of warnings unchanged"

    def matmul(self, x, packed, transpose=False):
        warnings.simplefilter("ignore")
        return super().matmul(x, packed, transpose)


class ScalesAndRestores(Healthy):
    """It doubles the weight in place, and halves it again."""

    breaks = "test_the_input_is_unchanged"
    says = "one that was taken back"

    def prepared(self, weight):
        if len(weight) == 33 and weight.device.type == "cpu" and not weight.requires_grad:
            weight.mul_(2).div_(2)
        return super().prepared(weight)
