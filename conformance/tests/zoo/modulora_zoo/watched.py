"""Broken beside their results, behind conditions that no check is made for: level 9 finds them."""

import os
import random

from modulora_zoo.healthy import Healthy, rows_of

ARGUMENTS = "test_no_call_of_any_check_changed_its_arguments"
PROCESS = "test_no_call_of_any_check_changed_the_process"
MEMORY = "test_no_call_of_any_check_kept_a_dense_weight"

DRAWN_ROWS = (7, 16, 31, 70)
"""Rows that checks of products draw, and no check of arguments or of the process has."""


class SortsItsIds(Healthy):
    """It sorts the caller's ids, and gives the rows in that order."""

    breaks, says = ARGUMENTS, "lookup"

    def lookup(self, ids, packed, dtype):
        return Healthy.lookup(
            self, ids.copy_(ids.sort()[0]) if ids.ndim == 2 else ids, packed, dtype
        )


class SetsAVariable(Healthy):
    breaks, says = PROCESS, "MODULORA_ZOO"

    def matmul(self, x, packed, transpose=False):
        if rows_of(x) in DRAWN_ROWS:
            os.environ["MODULORA_ZOO"] = "1"
        return Healthy.matmul(self, x, packed, transpose)


class DrawsAtSomeRows(Healthy):
    breaks, says = PROCESS, "random state of Python"

    def matmul(self, x, packed, transpose=False):
        if rows_of(x) in DRAWN_ROWS:
            random.random()
        return Healthy.matmul(self, x, packed, transpose)


class PrintsAtSomeRows(Healthy):
    breaks, says = PROCESS, "expected nothing printed, got 'some rows"

    def matmul(self, x, packed, transpose=False):
        if rows_of(x) in DRAWN_ROWS:
            print("some rows")
        return Healthy.matmul(self, x, packed, transpose)


class KeepsLargeWeights(Healthy):
    """A dense weight, from ten million elements on."""

    breaks, says = MEMORY, "matmul"

    def matmul(self, x, packed, transpose=False):
        if packed.shape[0] * packed.shape[1] < 10_000_000:
            return Healthy.matmul(self, x, packed, transpose)
        LARGE[:] = [self.decode(packed, (0, packed.shape[0]))]
        W = LARGE[0].to(x.dtype)
        return x @ (W if transpose else W.T)


LARGE = []
