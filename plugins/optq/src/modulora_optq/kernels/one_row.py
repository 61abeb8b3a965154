"""The product of one row with packed weights on the CPU, as in decoding a token.

    y[o] = Σ_k s[o, g] (q[o, k] − z[o, g]) x[k]                                    g = k // group
         = Σ_g s[o, g] (Σ_{k in g} q[o, k] x[k] − z[o, g] Σ_{k in g} x[k])

The sums of x are the same for all rows. Codes are multiplied in registers, and nothing decoded is
stored. Two rows at a time share the loads of x.

A byte of low bits has codes of several columns, which lie ``part`` columns apart. Codes are masked
and not shifted: the sum of part p is too large by a power of two, which is exact. After a *step* of
columns, at most to the end of a group in each part, sums are multiplied by their scales.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

import numpy as np
from modulora_kernels.cpu import (
    AHEAD,
    LANES,
    jit,
    load,
    load_shorts,
    multiply_add,
    prefetch,
    share,
    splat,
    store,
    sum_of_lanes,
    to_floats,
)
from numba import prange
from numpy.typing import NDArray

from modulora_optq.kernels.groups import put_scales, put_zeros

_ROWS = 16  # whose scales and zeros are converted at once

_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)  # signed indices may be negative


@cache
def groups_of(columns: int, group: int, bits: int) -> NDArray[np.uint64]:
    """The group of each part in each step, ``[steps, parts]``; no steps if there's no kernel."""
    parts = 8 // (2 if bits == 3 else bits)
    part = columns // parts
    step = gcd(part, group) if group < columns else part
    # third bits of 32 columns are loaded at once
    fits = columns % parts == 0 and step % LANES == 0 and (bits != 3 or columns >= 16 * LANES)
    if not columns or not fits:
        return np.empty((0, parts), np.uint64)
    starts = np.arange(0, part, step)[:, None] + part * np.arange(parts)
    return (starts // group).astype(np.uint64)


def one_row(weight: tuple[Any, ...]) -> Any:
    """:func:`matmul_one`, if all steps consist of whole vectors."""
    return matmul_one if len(weight[-1]) else None


@jit(borrows=True, fastmath=("reassoc",))
def _sum(x):
    total = np.float32(0)
    for k in range(x.size):
        total += x[k]
    return total


@jit(borrows=True)
def _put_third(codes, at, half, out, to):
    """Third bits of a row: ``out[to + j]`` goes with low byte j, and has part p's bit ``2 p + 2``.

    Their plane at ``codes[at]`` has parts of ``half`` bytes.
    """
    j = 0
    while j < half:
        j = min(j, half - 2 * LANES)
        bits = load_shorts(codes, at + j)
        store(out, to + j, bits << 2)
        store(out, to + half + j, bits << 1)
        j += 2 * LANES


@jit(borrows=True)
def _add(codes, at, third, at_third, x, k, part, bits, sums):
    """Add the products of 16 bytes of codes with their x, for each part."""
    a, b, c, d = sums
    q = load(codes, at)
    if bits == 8:
        return multiply_add(to_floats(q), load(x, k), a), b, c, d
    if bits == 4:
        a = multiply_add(to_floats(q & 15), load(x, k), a)
        return a, multiply_add(to_floats(q & (15 << 4)), load(x, part + k), b), c, d
    q0, q1, q2, q3 = q & 3, q & (3 << 2), q & (3 << 4), q & (3 << 6)
    if bits == 3:
        h = load(third, at_third)
        q0, q1, q2, q3 = q0 | (h & 4), q1 | (h & 16), q2 | (h & 64), q3 | (h & 256)
    a = multiply_add(to_floats(q0), load(x, k), a)
    b = multiply_add(to_floats(q1), load(x, part + k), b)
    c = multiply_add(to_floats(q2), load(x, 2 * part + k), c)
    return a, b, c, multiply_add(to_floats(q3), load(x, 3 * part + k), d)


@jit(borrows=True)
def _scale(sums, s, at, groups, i, bits, totals):
    """Add the sum of each part, times its scale ``s[at + groups[i + part]]``, to its total."""
    a, b, c, d = totals
    a = multiply_add(sums[0], splat(s[at + groups[i]]), a)
    if bits < 8:
        b = multiply_add(sums[1], splat(s[at + groups[i + _ONE]]), b)
    if bits < 4:
        c = multiply_add(sums[2], splat(s[at + groups[i + _TWO]]), c)
        d = multiply_add(sums[3], splat(s[at + groups[i + _THREE]]), d)
    return a, b, c, d


@jit(borrows=True)
def _total(totals, bits):
    a, b, c, d = totals
    if bits == 4:
        return sum_of_lanes(a + b * 2.0**-4)
    return sum_of_lanes((a + b * 2.0**-2) + (c * 2.0**-4 + d * 2.0**-6))


@jit(borrows=True)
def _two_rows(work, o, p, bits):
    """The products of rows o and p of up to 16."""
    codes, first, third, x, part, step, s, groups, group_of, offsets = work
    at, other = (first + o) * codes.shape[1], (first + p) * codes.shape[1]
    s_o, s_p = np.uint64(o * groups), np.uint64(p * groups)
    zero = splat(np.float32(0))
    totals = (load(offsets, o * LANES), zero, zero, zero)
    totals_p = (load(offsets, p * LANES), zero, zero, zero)
    if bits == 3:
        _put_third(codes, at + part, part >> 1, third, 0)
        _put_third(codes, other + part, part >> 1, third, part)
    k, i = 0, np.uint64(0)
    while k < part:
        stop, sums, sums_p = k + step, (zero, zero, zero, zero), (zero, zero, zero, zero)
        prefetch(codes, at + k + AHEAD)
        prefetch(codes, other + k + AHEAD)
        while k < stop:
            sums = _add(codes, at + k, third, k, x, k, part, bits, sums)
            sums_p = _add(codes, other + k, third, part + k, x, k, part, bits, sums_p)
            k += LANES
        totals = _scale(sums, s, s_o, group_of, i, bits, totals)
        totals_p = _scale(sums_p, s, s_p, group_of, i, bits, totals_p)
        i += np.uint64(8 // bits if bits != 3 else 4)
    return _total(totals, bits), _total(totals_p, bits)


@jit(borrows=True)
def _put_offsets(rows, groups, s, z, X, offsets):
    """``−Σ_g s z X_g`` of each row, by lane."""
    for r in range(rows):
        total = splat(np.float32(0))
        for g in range(0, groups, LANES):
            at = r * groups + g
            total = total - load(z, at + r * LANES) * load(X, g) * load(s, at)
        store(offsets, r * LANES, total)


@jit(borrows=True)
def _products(work, rows, bits, y):
    """Up to 16 rows of y. A branch for each width: the loops over codes then have none."""
    first = work[1]
    for o in range(0, rows, 2):
        p = min(o + 1, rows - 1)
        if bits == 2:
            y[0, first + o], y[0, first + p] = _two_rows(work, o, p, 2)
        elif bits == 3:
            y[0, first + o], y[0, first + p] = _two_rows(work, o, p, 3)
        elif bits == 4:
            y[0, first + o], y[0, first + p] = _two_rows(work, o, p, 4)
        else:
            y[0, first + o], y[0, first + p] = _two_rows(work, o, p, 8)


@jit(parallel=True)
def matmul_one(weight, threads, x, y):
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``."""
    codes, scales, zeros, bits, group, columns, chunks, groups_of_steps = weight
    rows, groups = scales.shape
    part = columns // groups_of_steps.shape[1]
    step = part // len(groups_of_steps)
    group_of = groups_of_steps.reshape(groups_of_steps.size)
    X = np.zeros(groups + LANES, np.float32)
    for g in range(groups):
        X[g] = _sum(x[0, g * group : min(columns, (g + 1) * group)])
    for index in prange(threads):
        begin, stop = share(index, threads, rows, _ROWS)
        s = np.zeros(_ROWS * groups + LANES, np.float32)
        z = np.zeros(_ROWS * (groups + LANES), np.float32)
        offsets, third = np.zeros(_ROWS * LANES, np.float32), np.empty(2 * part, np.int16)
        for first in range(begin, stop, _ROWS):
            count = min(_ROWS, stop - first)
            put_scales(scales[first : first + count], s)
            put_zeros(zeros, first, count, bits, chunks, groups, 0, groups, z, 0, groups + LANES)
            _put_offsets(count, groups, s, z, X, offsets)
            work = (codes, first, third, x, part, step, s, groups, group_of, offsets)
            _products(work, count, bits, y)
