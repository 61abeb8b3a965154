"""Inner loops on the CPU, a block of columns at a time: of :mod:`modulora_optq.reference`, and of
:mod:`modulora_optq.descent` after it.

The rows of W are independent of each other once U is known. A thread therefore takes one row
through the whole block, and keeps the row, its errors and the block of U in the cache. Nothing is
summed across threads. Kernels are compiled for fp32, and for fp64 if a weight is fp64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from modulora_kernels import jit
from numba import prange

from modulora_optq.reference import LARGEST_SCALE, SMALLEST_SCALE

_FP16_DIGITS = 11
_FP16_LEAST_EXPONENT = -13  # of math.frexp, whose mantissa is in [0.5, 1): 2⁻¹⁴ is the least normal


@jit()
def _fp16(x: float) -> float:
    """The nearest positive fp16, ties to even, rounded to fp32 first as torch rounds fp64."""
    x = float(np.float32(min(x, LARGEST_SCALE)))
    _, exponent = math.frexp(x)
    ulp = math.ldexp(1.0, max(exponent, _FP16_LEAST_EXPONENT) - _FP16_DIGITS)
    return max(float(np.rint(x / ulp)) * ulp, SMALLEST_SCALE)


@jit(fastmath=("reassoc", "contract"), borrows=True)
def _error(w: Any, loss: Any, s: Any, z: Any, maxq: Any) -> Any:
    """Σ_j loss_j (w_j − ŵ_j)². It multiplies by 1 / s: no code depends on it, only a choice."""
    number = w.dtype.type  # a Python number would make the whole loop fp64
    reciprocal, low, high = number(1) / s, -z, maxq - z
    total = number(0)
    for j in range(w.size):
        step = min(max(np.rint(w[j] * reciprocal), low), high)
        error = w[j] - s * step
        total += loss[j] * error * error
    return total


@jit()
def _grid(w: Any, loss: Any, symmetric: bool, shares: Any, maxq: Any) -> tuple[Any, Any]:
    """``reference.grid`` of one row of a group."""
    number = w.dtype.type
    low, high = min(w.min(), number(0)), max(w.max(), number(0))
    if symmetric:
        high = max(-low, high)
        low = -high
    # no scale is 0, so the first candidate is taken, and kept if all errors overflow
    least, best_s, best_z = number(np.inf), number(0), number(0)
    for share in shares:
        s = number(_fp16((high * share - low * share) / maxq))
        middle = (maxq + 1) / 2 if symmetric else np.rint(-(low * share) / s)
        for shift in (0, -1, 1):
            if shift != 0 and (symmetric or shares.size == 1):
                continue
            z = number(min(max(middle + shift, 0), maxq))
            error = _error(w, loss, s, z, maxq)
            if error < least or best_s == 0:
                least, best_s, best_z = error, s, z
    return best_s, best_z


@jit(parallel=True)
def grids(
    W: Any, loss: Any, symmetric: bool, shares: Any, maxq: Any, S: Any, Z: Any, g: int
) -> None:
    """``reference.grid`` of the group W, ``[out, columns]``, to column ``g`` of S and Z.

    ``maxq`` is an array of one number, in W's dtype.
    """
    for o in prange(W.shape[0]):
        S[o, g], Z[o, g] = _grid(W[o], loss, symmetric, shares, maxq[0])


@jit(fastmath=("contract",), borrows=True)
def _compensate(w: Any, e: float, U: Any, j: int, stop: int) -> None:
    """Subtract the error of column j from the columns after it, up to ``stop``."""
    after, factors = w[j + 1 : stop], U[j, j + 1 : stop]
    for k in range(after.size):
        after[k] -= e * factors[k]


@jit(parallel=True)
def block(
    W: Any, U: Any, group: Any, size: int, loss: Any, symmetric: bool, shares: Any, maxq: Any,
    start: int, stop: int, S: Any, Z: Any, Q: Any, E: Any,
) -> None:  # fmt: skip
    """Quantize columns ``[start, stop)`` of W: codes to Q, errors to E, ``[out, stop - start]``.

    Column ``j`` has the scale and the zero of ``group[j]``. Unless ``size`` is 0, they are chosen
    when a group of so many columns begins, and the block begins with a group. W changes inside the
    block only.
    """
    for o in prange(W.shape[0]):
        w, top = W[o], maxq[0]
        for j in range(start, stop):
            g = group[j]
            if size != 0 and j % size == 0:
                found = _grid(w[j : j + size], loss[j : j + size], symmetric, shares, top)
                S[o, g], Z[o, g] = found
            s, z = S[o, g], Z[o, g]
            code = min(max(np.rint(w[j] / s) + z, W.dtype.type(0)), top)
            e = (w[j] - s * (code - z)) / U[j, j]
            Q[o, j], E[o, j - start] = np.uint8(code), e
            _compensate(w, e, U, j, stop)


@jit(parallel=True)
def change_codes(R: Any, M: Any, Q: Any, S: Any, maxq: Any, start: int, size: int) -> None:
    """``descent._change_codes``: a thread takes one row through the block."""
    for o in prange(R.shape[0]):
        r, top = R[o], maxq[0]
        for j in range(R.shape[1]):
            s, code = S[o, (start + j) // size], R.dtype.type(Q[o, start + j])
            new = min(max(code + np.rint(r[j] / (s * M[j, j])), R.dtype.type(0)), top)
            change = s * (new - code)
            if change != 0:
                _compensate(r, change, M, j, R.shape[1])
            r[j] = change
            Q[o, start + j] = np.uint8(new)
