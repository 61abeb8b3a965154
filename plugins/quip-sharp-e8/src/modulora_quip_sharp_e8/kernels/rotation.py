"""Rotates rows by H_n on a CPU, a row at a time in a core's cache, for numba's kernels.

A row of n = K · m numbers is K segments of m. Sylvester's matrix of order m is applied to each
segment in log₂ m passes over the row::

    y[k] = x[2k] + x[2k + 1]        y[n/2 + k] = x[2k] − x[2k + 1]        k < n/2

Each pass moves the lowest bit of a number's place to the top. So after the last one the row is
``[m, K]``, and the matrix of order K follows as a product of matrices. All bits of a row are the
same for any other rows and any number of threads. The order of sums is part of the packed bytes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels.cpu import (
    LANES,
    from_half,
    jit,
    load,
    multiply_add,
    narrow_row,
    scratch,
    share,
    splat,
    store,
    widen,
)

_ROWS = 4  # of the row as [m, K], multiplied at once


@jit(borrows=True)
def _add_signed(y: Any, at: int, line: Any, next_line: Any, third: Any, last: Any) -> Any:
    """Σ y[at + i] · line i for four lines of ±1, whose products are exact, in pairs."""
    first = multiply_add(splat(y[at + 1]), next_line, splat(y[at]) * line)
    return first + multiply_add(splat(y[at + 3]), last, splat(y[at + 2]) * third)


@jit(borrows=True)
def _multiply_signs(y: Any, at: int, K: int, M: Any, column: int, z: Any, to: int) -> None:
    """``z[to + i · columns + l] = Σ_a y[at + i K + a] M[a, column + l]``, i < 4 and l < 16.

    M is a Hadamard matrix, ``[K, columns]``, and 4 divides K.
    """
    columns = M.shape[1]
    a = b = c = d = splat(np.float32(0))
    for k in range(0, K, 4):
        place = k * columns + column
        one, two = load(M, place), load(M, place + columns)
        three, four = load(M, place + 2 * columns), load(M, place + 3 * columns)
        a = a + _add_signed(y, at + k, one, two, three, four)
        b = b + _add_signed(y, at + K + k, one, two, three, four)
        c = c + _add_signed(y, at + 2 * K + k, one, two, three, four)
        d = d + _add_signed(y, at + 3 * K + k, one, two, three, four)
    store(z, to, a)
    store(z, to + columns, b)
    store(z, to + 2 * columns, c)
    store(z, to + 3 * columns, d)


@jit(borrows=True)
def _multiply_numbers(y: Any, at: int, K: int, M: Any, column: int, z: Any, to: int) -> None:
    """The same for any M."""
    columns = M.shape[1]
    a = b = c = d = splat(np.float32(0))
    for k in range(K):
        line = load(M, k * columns + column)
        a = multiply_add(splat(y[at + k]), line, a)
        b = multiply_add(splat(y[at + K + k]), line, b)
        c = multiply_add(splat(y[at + 2 * K + k]), line, c)
        d = multiply_add(splat(y[at + 3 * K + k]), line, d)
    store(z, to, a)
    store(z, to + columns, b)
    store(z, to + 2 * columns, c)
    store(z, to + 3 * columns, d)


@jit(borrows=True)
def _multiply(y: Any, M: Any, K: int, m: int, z: Any) -> None:
    """``z = y M`` for ``y`` ``[m, K]`` and M ``[K, columns]``, both flat but M."""
    columns = M.shape[1]
    if m < LANES:
        for t in range(m):
            line = z[t * columns : (t + 1) * columns]
            line[:] = 0
            for a in range(K):
                factor, of = y[t * K + a], M[a]
                for b in range(line.size):
                    line[b] += factor * of[b]
        return
    for t in range(0, m, _ROWS):
        for b in range(0, columns, LANES):
            if K % 4 == 0:
                _multiply_signs(y, t * K, K, M, b, z, t * columns + b)
            else:
                _multiply_numbers(y, t * K, K, M, b, z, t * columns + b)


@jit(borrows=True)
def _pass(y: Any, z: Any) -> None:
    half = z.size // 2
    low, high = z[:half], z[half:]
    for k in range(half):
        a, b = y[2 * k], y[2 * k + 1]
        low[k] = a + b
        high[k] = a - b


@jit(borrows=True)
def _two_passes(y: Any, z: Any) -> None:
    n = z.size // 4
    first, second, third, last = z[:n], z[n : 2 * n], z[2 * n : 3 * n], z[3 * n :]
    for k in range(n):
        a, b, c, d = y[4 * k], y[4 * k + 1], y[4 * k + 2], y[4 * k + 3]
        first[k] = (a + b) + (c + d)
        second[k] = (a - b) + (c - d)
        third[k] = (a + b) - (c + d)
        last[k] = (a - b) - (c - d)


@jit()
def rotate_rows(
    x: Any, scale: Any, unit: Any, M: Any, K: int, after: bool, start: int, stop: int, out: Any
) -> None:
    """Rotate rows ``[start, stop)``: ``(x ⊙ s) H_n``, or ``(x H_n) ⊙ s`` if ``after``.

    Args:
        x, out: ``[rows, n]``, fp32 or the bits of bf16; they may be the same.
        scale: s in units of ``unit``, the bits of fp16 ``[n]``; of length 0 for none.
        unit: fp32 ``[1]``.
        M: M_K, or its transpose for H_nᵀ, fp32 ``[K, columns]`` with columns of zeros.
        K: the order of M_K; n = K · m.
    """
    n = x.shape[1]
    m, columns = n // K, M.shape[1]
    room = scratch(4, max(n, m * columns), np.float32)
    before, behind = room[2], room[3]
    norm = np.float32(1 / math.sqrt(n))
    before[:] = norm
    if scale.size:
        for i in range(n):
            behind[i] = from_half(scale[i]) * unit[0]
            before[i] = norm if after else norm * behind[i]
    for r in range(start, stop):
        row = x[r]
        y, z = room[0], room[1]
        for i in range(n):
            y[i] = widen(row[i]) * before[i]
        h = m
        while h > 1:
            if h > 2:
                _two_passes(y, z[:n])
            else:
                _pass(y, z[:n])
            y, z, h = z, y, h // 4
        if K > 1:
            _multiply(y, M, K, m, z)
            for b in range(K):
                segment = y[b * m : (b + 1) * m]
                for t in range(m):
                    segment[t] = z[t * columns + b]
        if after:
            for i in range(n):
                y[i] *= behind[i]
        narrow_row(y[:n], out[r])


@jit(parallel=True)
def rotate(
    x: Any, scale: Any, unit: Any, M: Any, K: int, after: bool, threads: int, out: Any
) -> None:
    """:func:`rotate_rows` for all rows, on ``threads`` threads."""
    for index in prange(threads):
        start, stop = share(index, threads, len(x))
        rotate_rows(x, scale, unit, M, K, after, start, stop, out)
