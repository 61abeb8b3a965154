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

from modulora_optq.reference import CHAIN, ENOUGH, HOPEFUL, LARGEST_SCALE, SMALLEST_SCALE

_SEARCHED = 64  # columns in each of which the least cost is known, so that fewer are compared
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


@jit(borrows=True)
def _put_prices(code: int, top: Any, own: Any, k: int, up: Any, down: Any) -> None:
    """The price of a step of code k but for its gain, s² M_kk; infinite without room."""
    infinite = up.dtype.type(np.inf)
    up[k] = own[k] if code < top else infinite
    down[k] = own[k] if code > 0 else infinite


@jit(fastmath=("contract",), borrows=True)
def _put_costs(r: Any, twice_s: Any, up: Any, down: Any, cost: Any) -> None:
    """The error that the better step of each code adds."""
    for k in range(r.size):
        gain = twice_s[k] * r[k]
        cost[k] = min(up[k] - gain, down[k] + gain)


@jit(borrows=True)
def _place_of_least(bits: Any) -> int:
    """The first place of the least float, whose bits change.

    LLVM makes no vectors of a minimum of floats. So the low bits of negative numbers are turned,
    and whole numbers are compared.
    """
    number = bits.dtype.type
    sign = number(8 * bits.itemsize - 1)
    others = ~(number(1) << sign)
    for k in range(bits.size):
        bits[k] ^= (bits[k] >> sign) & others
    least, place = bits[0], 0
    for start in range(0, bits.size, _SEARCHED):
        part, lowest = bits[start : start + _SEARCHED], bits[start]
        for k in range(part.size):
            lowest = min(lowest, part[k])
        if lowest < least:
            least, place = lowest, start
    while bits[place] != least:
        place += 1
    return place


@jit(fastmath=("contract",), borrows=True)
def _subtract(r: Any, change: Any, M_k: Any) -> None:
    for k in range(r.size):
        r[k] -= change * M_k[k]


@jit(parallel=True)
def change_chains(
    R: Any, M: Any, Q: Any, S: Any, maxq: Any, start: int, size: int, bits: Any
) -> None:
    """``descent._change_chains``: a thread takes one row through the block.

    ``bits`` is a whole number of as many bits as R's, ``[1]``.
    """
    columns, number = R.shape[1], R.dtype.type
    half, enough, infinite = number(0.5), number(ENOUGH), number(np.inf)
    for o in prange(R.shape[0]):
        r, top, work = R[o], maxq[0], np.empty((6, columns), R.dtype)
        twice_s, own, up, down, left, moved = work[0], work[1], work[2], work[3], work[4], work[5]
        cost = np.empty(columns, R.dtype)
        chain, steps = np.empty(CHAIN, np.int64), np.empty(CHAIN, R.dtype)
        for j in range(columns):
            s = S[o, (start + j) // size]
            twice_s[j], own[j], moved[j] = s + s, s * s * M[j, j], number(0)
            _put_prices(Q[o, start + j], top, own, j, up, down)
        for j in range(columns):
            gain = twice_s[j] * r[j]
            total = min(up[j] - gain, down[j] + gain)
            if not total <= number(1 - HOPEFUL) * own[j]:
                continue
            bound, length, k = -enough * own[j], 0, j
            left[:] = r
            while True:
                gain = twice_s[k] * left[k]
                chain[length] = k
                steps[length] = number(1) if up[k] - gain <= down[k] + gain else number(-1)
                length += 1
                if total < bound or length == CHAIN:
                    break
                up[k] = down[k] = infinite
                _subtract(left, half * twice_s[k] * steps[length - 1], M[k])
                _put_costs(left, twice_s, up, down, cost)
                k = _place_of_least(cost.view(bits.dtype))
                gain = twice_s[k] * left[k]
                total += min(up[k] - gain, down[k] + gain)
            for i in range(length):
                k = chain[i]
                if total < bound:
                    change = half * twice_s[k] * steps[i]
                    _subtract(r, change, M[k])
                    moved[k] += change
                    Q[o, start + k] = np.uint8(number(Q[o, start + k]) + steps[i])
                _put_prices(Q[o, start + k], top, own, k, up, down)
        r[:] = moved
