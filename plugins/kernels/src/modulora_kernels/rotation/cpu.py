"""Rotate rows by H_n on a CPU, a row at a time in a core's cache.

A row of n = K · m numbers is K segments of m. Sylvester's matrix of order m is applied to each
segment by log₂ m stages of butterflies, h = 1, 2, 4, … m / 2::

    y[i], y[i + h] = y[i] + y[i + h], y[i] − y[i + h]

The first four stages stay inside of a vector of sixteen; later ones are done in pairs. The matrix
of order K follows as a product of matrices, or none if segments are rotated apart. All bits of a
row are the same for any other rows and any number of threads. The order of sums is part of the
packed bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

import modulora_kernels as kernels
from modulora_kernels.cpu import (
    LANES,
    from_half,
    jit,
    load,
    lookup,
    multiply_add,
    narrow_row,
    scratch,
    share,
    splat,
    store,
    widen,
)
from modulora_kernels.rotation.transform import factor, order

_TERMS = 128  # of Hartley's sums, added one after another: longer sums are less exact

_LANE = np.arange(LANES, dtype=np.int32)
_PARTNERS = np.concatenate([_LANE ^ h for h in (1, 2, 4, 8)])
_SIGNS = np.concatenate([1.0 - 2.0 * (_LANE & h > 0) for h in (1, 2, 4, 8)]).astype(np.float32)


# --- Sylvester's matrix ----------------------------------------------------------------------


@jit(borrows=True)
def _first_stages(y):
    """Stages h = 1, 2, 4 and 8, in registers."""
    one, two = load(_PARTNERS, 0), load(_PARTNERS, LANES)
    four, eight = load(_PARTNERS, 2 * LANES), load(_PARTNERS, 3 * LANES)
    s, t = load(_SIGNS, 0), load(_SIGNS, LANES)
    u, v = load(_SIGNS, 2 * LANES), load(_SIGNS, 3 * LANES)
    for i in range(0, y.size, LANES):
        x = load(y, i)
        x = multiply_add(x, s, lookup(x, one))
        x = multiply_add(x, t, lookup(x, two))
        x = multiply_add(x, u, lookup(x, four))
        store(y, i, multiply_add(x, v, lookup(x, eight)))


@jit(borrows=True)
def _stage(y, h):
    for begin in range(0, y.size, 2 * h):
        for i in range(begin, begin + h, LANES):
            a, b = load(y, i), load(y, i + h)
            store(y, i, a + b)
            store(y, i + h, a - b)


@jit(borrows=True)
def _two_stages(y, h):
    """Stages h and 2 h, in one pass over the row."""
    for begin in range(0, y.size, 4 * h):
        for i in range(begin, begin + h, LANES):
            a, b, c, d = load(y, i), load(y, i + h), load(y, i + 2 * h), load(y, i + 3 * h)
            s, t, u, v = a + b, a - b, c + d, c - d
            store(y, i, s + u)
            store(y, i + h, t + v)
            store(y, i + 2 * h, s - u)
            store(y, i + 3 * h, t - v)


@jit(borrows=True)
def _short_stages(y, m):
    """All stages of segments that are shorter than a vector."""
    h = 1
    while h < m:
        for begin in range(0, y.size, 2 * h):
            for i in range(begin, begin + h):
                a, b = y[i], y[i + h]
                y[i], y[i + h] = a + b, a - b
        h *= 2


@jit(borrows=True)
def _sylvester(y, m):
    """All stages of each segment of ``m`` numbers of ``y``, in place."""
    if m < LANES:
        _short_stages(y, m)
        return
    _first_stages(y)
    h = LANES
    while 2 * h < m:
        _two_stages(y, h)
        h *= 4
    if h < m:
        _stage(y, h)


# --- the matrix of order K -------------------------------------------------------------------


@jit(borrows=True)
def _pairs(one, two, three, four, M, at, step):
    """Sum M[at + i step] · line i of four lines, in pairs. M holds signs, so products are exact."""
    first = multiply_add(two, splat(M[at + step]), one * splat(M[at]))
    return first + multiply_add(four, splat(M[at + 3 * step]), three * splat(M[at + 2 * step]))


@jit(borrows=True)
def _multiply_signs(y, t, m, M, K, b, z):
    """``z[(b + i) m + t + l] = Σ_a M[a, b + i] y[a m + t + l]``, i < 4 and l < 16.

    M is a Hadamard matrix, flat ``[K, K]``, and 4 divides K.
    """
    p = q = r = s = splat(np.float32(0))
    for a in range(0, K, 4):
        at, line = a * K + b, a * m + t
        one, two = load(y, line), load(y, line + m)
        three, four = load(y, line + 2 * m), load(y, line + 3 * m)
        p = p + _pairs(one, two, three, four, M, at, K)
        q = q + _pairs(one, two, three, four, M, at + 1, K)
        r = r + _pairs(one, two, three, four, M, at + 2, K)
        s = s + _pairs(one, two, three, four, M, at + 3, K)
    store(z, b * m + t, p)
    store(z, (b + 1) * m + t, q)
    store(z, (b + 2) * m + t, r)
    store(z, (b + 3) * m + t, s)


@jit(borrows=True)
def _multiply_numbers(y, t, m, M, K, b, z):
    """Multiply as :func:`_multiply_signs` does, for one row of z and any M."""
    total = splat(np.float32(0))
    for a in range(K):
        total = multiply_add(load(y, a * m + t), splat(M[a * K + b]), total)
    store(z, b * m + t, total)


@jit(borrows=True)
def _add_line(factor, x, total):
    for b in range(total.size):
        total[b] += factor * x[b]


@jit(borrows=True)
def _multiply_short(y, m, M, K, z, line, part):
    """``z = Mᵀ y`` for rows that are shorter than a vector; ``line`` and ``part`` are scratch."""
    terms = _TERMS if K % 4 else K
    for t in range(m):
        line[:] = 0
        for first in range(0, K, terms):
            part[:] = 0
            for a in range(first, min(first + terms, K)):
                _add_line(y[a * m + t], M[a], part)
            _add_line(np.float32(1), part, line)
        for b in range(K):
            z[b * m + t] = line[b]


@jit(borrows=True)
def _multiply(y, m, M, K, z, line, part):
    """``z = Mᵀ y`` for ``y`` and ``z``, ``[K, m]``, flat."""
    if m < LANES:
        _multiply_short(y, m, M, K, z, line, part)
        return
    flat = M.reshape(M.size)
    for t in range(0, m, LANES):
        if K % 4 == 0:
            for b in range(0, K, 4):
                _multiply_signs(y, t, m, flat, K, b, z)
        else:
            for b in range(K):
                _multiply_numbers(y, t, m, flat, K, b, z)


# --- rows ------------------------------------------------------------------------------------


@jit()
def rotate_rows(x, scale, unit, M, K, after, start, stop, out):
    """Rotate rows ``[start, stop)``: ``(x ⊙ s) H_n``, or ``(x H_n) ⊙ s`` if ``after``.

    Args:
        x, out: ``[rows, n]``, fp32 or the bits of bf16; they may be the same.
        scale: s in units of ``unit``, the bits of fp16 ``[n]``; of length 0 for none.
        unit: fp32 ``[1]``.
        M: M_K, or its transpose for H_nᵀ, fp32 ``[K, K]``; empty to rotate K segments apart.
        K: the order of M_K; n = K · m.
    """
    n = x.shape[1]
    m = n // K
    room = scratch(6, n, np.float32)
    before, behind, line, part = room[2], room[3], room[4][:K], room[5][:K]
    norm = np.float32(1 / math.sqrt(n if M.size else m))
    before[:] = norm
    if scale.size:
        for i in range(n):
            behind[i] = from_half(scale[i]) * unit[0]
            before[i] = norm if after else norm * behind[i]
    for r in range(start, stop):
        y, row = room[0], x[r]
        for i in range(n):
            y[i] = widen(row[i]) * before[i]
        _sylvester(y, m)
        if K > 1 and M.size:
            _multiply(y, m, M, K, room[1], line, part)
            y = room[1]
        if after:
            for i in range(n):
                y[i] *= behind[i]
        narrow_row(y, out[r])


@jit(parallel=True)
def _rotate_in_parallel(x, scale, unit, M, K, after, threads, out):
    """:func:`rotate_rows` for all rows, on ``threads`` threads."""
    for index in prange(threads):
        start, stop = share(index, threads, len(x))
        rotate_rows(x, scale, unit, M, K, after, start, stop, out)


# --- from torch ------------------------------------------------------------------------------

UNIT = np.ones(1, np.float32)
"""The unit of a scale that has none."""

_NO_SCALE = np.empty(0, np.int16)


@lru_cache(maxsize=16)
def factors(n: int, block: int | None = None, transpose: bool = False) -> tuple[Any, int]:
    """``M`` and ``K`` of :func:`rotate_rows` for H_n, or for I ⊗ H_block, or for the transpose."""
    if block is not None:
        return np.empty((0, 0), np.float32), n // block
    M = factor(order(n)).to(torch.float32)
    return (M.T if transpose else M).contiguous().numpy(), order(n)


def rotate(
    x: Tensor,
    scale: Tensor | None,
    unit: Tensor | None,
    *,
    after: bool,
    transpose: bool,
    in_place: bool,
    dtype: torch.dtype,
    block: int | None,
) -> Tensor:
    """:func:`modulora_kernels.rotation.rotate` for ``x`` ``[rows, n]``, not of fp64."""
    given = x if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)
    given = given.contiguous()
    reuses = dtype is given.dtype and (in_place or given is not x)
    out = given if reuses else torch.empty(x.shape, dtype=dtype, device="cpu")
    vectors = _NO_SCALE if scale is None else scale, UNIT if unit is None else unit
    arguments = *vectors, *factors(x.shape[1], block, transpose), after
    threads = min(len(x), torch.get_num_threads())
    if threads == 1:  # waking others costs as much as a row
        kernels.launch(rotate_rows, given, *arguments, 0, len(x), out)
    else:
        kernels.launch(_rotate_in_parallel, given, *arguments, threads, out)
    return out
