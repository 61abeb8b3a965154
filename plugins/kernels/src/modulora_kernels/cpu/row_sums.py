"""Sums for the product of one row: four vectors, because an addition waits for the one before."""

from __future__ import annotations

import numpy as np

from modulora_kernels.compiled import jit
from modulora_kernels.cpu.vectors import multiply_add, splat, sum_of_lanes


@jit(borrows=True)
def four_sums():
    """Four vectors of zeros."""
    zero = splat(np.float32(0))
    return zero, zero, zero, zero


@jit(borrows=True)
def add_in_turn(a, b, sums):
    """Add ``a * b`` to the first of four sums, and put it last."""
    first, second, third, fourth = sums
    return second, third, fourth, multiply_add(a, b, first)


@jit(borrows=True)
def sum_of_four(sums):
    """The sum of all numbers of four vectors."""
    a, b, c, d = sums
    return sum_of_lanes((a + b) + (c + d))
