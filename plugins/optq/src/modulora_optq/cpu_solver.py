"""OPTQ's inner loop on the CPU, compiled by numba: :mod:`modulora_optq.reference` a block of columns at a time.

Given U the rows of W are independent of one another, so a thread takes a row through the whole block, where the row,
its errors and the block of U stay in cache. Nothing is summed across threads: their number doesn't change a bit.
Kernels are compiled for fp32 and, for weights in fp64, for fp64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_optq.reference import LARGEST_SCALE, SMALLEST_SCALE

_FP16_DIGITS = 11
_FP16_LEAST_EXPONENT = (
    -13
)  # of math.frexp, whose mantissa is in [0.5, 1): 2**-14 is the least normal number


@jit()
def _fp16(x: float) -> float:
    """The nearest positive fp16 number, a tie to the even one, by way of fp32 as torch goes from fp64."""
    x = float(np.float32(min(x, LARGEST_SCALE)))
    _, exponent = math.frexp(x)
    ulp = math.ldexp(1.0, max(exponent, _FP16_LEAST_EXPONENT) - _FP16_DIGITS)
    return max(float(np.rint(x / ulp)) * ulp, SMALLEST_SCALE)


@jit(fastmath=("reassoc", "contract"), borrows=True)
def _loss(w: Any, weight: Any, s: Any, z: Any, levels: Any) -> Any:
    """Σ_j weight_j (w_j − ŵ_j)². Times 1/s instead of division: only a choice hangs on it, no code."""
    number = w.dtype.type  # a Python number would make fp64 of the whole loop
    reciprocal, low, high = number(1) / s, -z, levels - z
    total = number(0)
    for j in range(w.size):
        step = min(max(np.rint(w[j] * reciprocal), low), high)
        error = w[j] - s * step
        total += weight[j] * error * error
    return total


@jit()
def _grid(w: Any, weight: Any, levels: Any, symmetric: bool, shares: Any) -> tuple[Any, Any]:
    """``reference.grid`` of one row of a group."""
    number = w.dtype.type
    low, high = min(w.min(), number(0)), max(w.max(), number(0))
    if symmetric:
        high = max(-low, high)
        low = -high
    least = number(np.inf)
    best_s, best_z = (
        number(0),
        number(0),
    )  # no scale is 0: the first is kept where all losses overflow
    for share in shares:
        s = number(_fp16((high * share - low * share) / levels))
        middle = (levels + 1) / 2 if symmetric else np.rint(-(low * share) / s)
        for shift in (0, -1, 1):
            if shift != 0 and (symmetric or shares.size == 1):
                continue
            z = number(min(max(middle + shift, 0), levels))
            loss = _loss(w, weight, s, z, levels)
            if loss < least or best_s == 0:
                least, best_s, best_z = loss, s, z
    return best_s, best_z


@jit(parallel=True)
def grids(
    W: Any, weight: Any, symmetric: bool, shares: Any, levels: Any, S: Any, Z: Any, g: int
) -> None:
    """``reference.grid`` of the group W ``[out, columns]`` to column ``g`` of S and Z."""
    for o in prange(W.shape[0]):
        S[o, g], Z[o, g] = _grid(W[o], weight, levels[0], symmetric, shares)


@jit(fastmath=("contract",), borrows=True)
def _subtract(w: Any, e: float, U: Any, j: int, stop: int) -> None:
    """What column j's error takes from those after it, up to ``stop``."""
    after, factors = w[j + 1 : stop], U[j, j + 1 : stop]
    for k in range(after.size):
        after[k] -= e * factors[k]


@jit(parallel=True)
def block(
    W: Any, U: Any, group: Any, size: int, weight: Any, symmetric: bool, shares: Any, levels: Any,
    start: int, stop: int, S: Any, Z: Any, Q: Any, E: Any,
) -> None:  # fmt: skip
    """Quantize columns ``[start, stop)`` of W: codes to Q, errors e to E ``[out, stop - start]``.

    Column ``j`` takes S and Z of ``group[j]``. Where ``size`` isn't 0 they are chosen when a group of so many columns
    starts, and the block starts with one. W's columns of the block are updated, those after it aren't.
    """
    for o in prange(W.shape[0]):
        w, top = W[o], levels[0]
        for j in range(start, stop):
            g = group[j]
            if size != 0 and j % size == 0:
                S[o, g], Z[o, g] = _grid(
                    w[j : j + size], weight[j : j + size], top, symmetric, shares
                )
            s, z = S[o, g], Z[o, g]
            code = min(max(np.rint(w[j] / s) + z, W.dtype.type(0)), top)
            e = (w[j] - s * (code - z)) / U[j, j]
            Q[o, j], E[o, j - start] = np.uint8(code), e
            _subtract(w, e, U, j, stop)
