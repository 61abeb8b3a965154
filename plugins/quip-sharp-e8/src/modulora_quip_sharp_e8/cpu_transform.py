"""The orthogonal transform on the CPU, compiled by numba: a row at a time, in the L1 or L2 cache.

A row of n = K · m coordinates, m a power of two, is K segments: a fast Walsh–Hadamard transform of each segment, then the
matrix of order K across the segments. Rows are shared out to threads and don't know of each other: a row's
bits are the same in whatever company it comes.

LLVM doesn't find vectors in butterflies of 1, 2, 4, 8 coordinates, nor keep sums of a matrix product in registers:
those are spelled, in terms that any processor's instructions can be made from.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import from_half, narrow_row, scratch, share, widen
from modulora_core.kernels.cpu.ir import LANES, bf16_to_float
from modulora_quip_sharp_e8.cpu_across import INDEX, LANE, across, load, store


def _across_vectors(builder: Any, values: list[Any]) -> list[Any]:
    """The transform across so many vectors, a power of two."""
    half = 1
    while half < len(values):
        for i in range(len(values)):
            if not i & half:
                a, b = values[i], values[i | half]
                values[i], values[i | half] = builder.fadd(a, b), builder.fsub(a, b)
        half *= 2
    return values


def _within_vector(builder: Any, v: Any) -> Any:
    """The transform of order 16 of a vector."""
    for half in (1, 2, 4, 8):
        partner = ir.Constant(ir.VectorType(LANE, LANES), [i ^ half for i in range(LANES)])
        sign = ir.Constant(v.type, [-1.0 if i & half else 1.0 for i in range(LANES)])
        swapped = builder.shuffle_vector(v, v, partner)
        v = builder.fadd(swapped, builder.fmul(v, sign, flags=("contract",)), flags=("contract",))
    return v


def _numbers(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Sixteen values of an array, as numbers: bits of bf16 as what they stand for."""
    values = load(context, builder, kind, array, index)
    return values if isinstance(kind.dtype, types.Float) else bf16_to_float(builder, values)


def _first_transform(vectors: int) -> Any:
    """The intrinsic that begins a row, so many vectors at once, a power of two."""
    order = LANES * vectors

    @intrinsic
    def transform(_context: Any, x: Any, before: Any, row: Any, _n: Any) -> Any:
        """``x ⊙ before``, of ``n`` coordinates, and the transform of ``order`` of each so many of them, to ``row``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *arrays, n = arguments
            given, factors, to = zip(signature.args[:3], arrays, strict=True)
            with cgutils.for_range(builder, builder.sdiv(n, INDEX(order))) as loop:
                first = builder.mul(loop.index, INDEX(order))
                places = [builder.add(first, INDEX(LANES * i)) for i in range(vectors)]
                values = []
                for place in places:
                    a, b = (_numbers(context, builder, *array, place) for array in (given, factors))
                    values.append(_within_vector(builder, builder.fmul(a, b)))
                for place, value in zip(places, _across_vectors(builder, values), strict=True):
                    store(context, builder, *to, place, value)
            return context.get_dummy_value()

        return types.void(x, before, row, types.int64), generate

    return transform


_first16, _first32, _first64 = (_first_transform(vectors) for vectors in (1, 2, 4))


def _butterflies(order: int) -> Any:
    """The intrinsic for so many vectors at once, a power of two."""

    @intrinsic
    def butterfly(_context: Any, x: Any, at: Any, step: Any) -> Any:
        """The transform of that order across vectors at ``at``, ``at + step``, ``at + 2 step``, ..., in place."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array, at, step = arguments
            kind, places = signature.args[0], [at]
            while len(places) < order:
                places.append(builder.add(places[-1], step))
            values = [load(context, builder, kind, array, place) for place in places]
            for place, value in zip(places, _across_vectors(builder, values), strict=True):
                store(context, builder, kind, array, place, value)
            return context.get_dummy_value()

        return types.void(x, at, step), generate

    return butterfly


_two, _four, _eight = (_butterflies(order) for order in (2, 4, 8))


@jit(borrows=True)
def _walsh_rest(row: Any, n: int, m: int, h: int) -> None:
    """Of the transforms of order m of a row's segments what is left after those of order h; both are 16 or more."""
    while 8 * h <= m:
        for i in range(0, n, 8 * h):
            for j in range(i, i + h, LANES):
                _eight(row, j, h)
        h *= 8
    if 4 * h == m:
        for i in range(0, n, m):
            for j in range(i, i + h, LANES):
                _four(row, j, h)
    elif 2 * h == m:
        for i in range(0, n, m):
            for j in range(i, i + h, LANES):
                _two(row, j, h)


@jit(borrows=True)
def _walsh_few(x: Any, before: Any, row: Any, n: int, m: int) -> None:
    """``x ⊙ before``, and the transforms of order m, below 16, of its segments, to ``row``."""
    for i in range(n):
        row[i] = widen(x[i]) * before[i]
    h = 1
    while h < m:
        for i in range(0, n, 2 * h):
            for j in range(i, i + h):
                a, b = row[j], row[j + h]
                row[j], row[j + h] = a + b, a - b
        h *= 2


@jit(borrows=True)
def _rotate_row(
    x: Any, before: Any, matrix: Any, K: int, after: Any, scratch: Any, out: Any
) -> None:
    """See :func:`rotate_rows`; ``out`` is no bf16."""
    n = out.size
    m = n // K
    row = out if K == 1 else scratch
    if m >= 64:
        _first64(x, before, row, n)
        _walsh_rest(row, n, m, 64)
    elif m == 32:
        _first32(x, before, row, n)
    elif m == 16:
        _first16(x, before, row, n)
    else:
        _walsh_few(x, before, row, n, m)
    if K > 1:
        across(row, matrix, K, m, out)
    if after.size:
        for i in range(n):
            out[i] *= after[i]


def _rotate_row_to(
    x: Any, before: Any, matrix: Any, K: int, after: Any, scratch: Any, out: Any
) -> None:
    """See :func:`rotate_rows`: to numbers, or to bits of bf16."""
    raise NotImplementedError("_rotate_row_to() is for kernels that numba compiles")


@overload(_rotate_row_to, inline="always")  # inlined, it counts no references to arrays
def _rotate_row_to_of(
    x: Any, before: Any, matrix: Any, K: int, after: Any, scratch: Any, out: Any
) -> Any:
    def to_numbers(
        x: Any, before: Any, matrix: Any, K: int, after: Any, scratch: Any, out: Any
    ) -> None:
        _rotate_row(x, before, matrix, K, after, scratch[0], out)

    def to_bf16(
        x: Any, before: Any, matrix: Any, K: int, after: Any, scratch: Any, out: Any
    ) -> None:
        _rotate_row(x, before, matrix, K, after, scratch[0], scratch[1])
        narrow_row(scratch[1], out)

    return to_numbers if isinstance(out.dtype, types.Float) else to_bf16


@jit(borrows=True)
def rotate_rows(
    x: Any,
    before: Any,
    matrix: Any,
    K: int,
    after: Any,
    start: int,
    stop: int,
    scratch: Any,
    out: Any,
) -> None:
    """``out[r] = ((x[r] ⊙ before) (M ⊗ Sylvester_m)) ⊙ after`` for rows ``[start, stop)``, on this thread.

    Args:
        x: ``[rows, n]``, fp32 or fp64, as all others are; or, where they are fp32, the bits of bf16, int16.
        before: ``[n]``, with the factor that makes the transform orthogonal.
        matrix: M, laid out by :func:`modulora_quip_sharp_e8.transform.laid_out`. Not read for K = 1.
        K: order of M; n = K · m.
        after: ``[n]``, or of length 0 for none.
        start, stop: which rows.
        scratch: ``[2, n]``.
        out: ``[rows, n]``: ``x`` itself, or no part of it; of its dtype, or bits of bf16, rounded once.
    """
    for r in range(start, stop):
        _rotate_row_to(x[r], before, matrix, K, after, scratch, out[r])


@jit(parallel=True)
def rotate(x: Any, before: Any, matrix: Any, K: int, after: Any, scratch: Any, out: Any) -> None:
    """:func:`rotate_rows` for all rows, on as many threads as ``scratch``, ``[threads, 2, n]``, has parts."""
    rows, pieces = len(x), len(scratch)
    for piece in prange(pieces):
        start, stop = share(piece, pieces, rows)
        rotate_rows(x, before, matrix, K, after, start, stop, scratch[piece], out)


@jit()
def turn_rows(
    x: Any, scale: Any, unit: Any, matrix: Any, K: int, after: bool, start: int, stop: int, out: Any
) -> None:
    """``out[r] = x[r] ⊙ s`` rotated, or ``x[r]`` rotated and then ``⊙ s`` where ``after``, for rows ``[start, stop)``, on this thread.

    ``x`` and ``out`` are ``[rows, n]``, fp32 or bits of bf16; s is ``unit`` times ``scale``, the bits of fp16 ``[n]``. For the others see
    :func:`rotate_rows`.
    """
    n = x.shape[1]
    norm = np.float32(1 / math.sqrt(n))
    room = scratch(4, n, np.float32)
    first, last = room[2], room[3]
    for i in range(n):
        factor = from_half(scale[i]) * unit
        first[i] = norm if after else norm * factor
        last[i] = factor
    rotate_rows(x, first, matrix, K, last if after else last[:0], start, stop, room[:2], out)


@jit(parallel=True)
def turn(
    x: Any, scale: Any, unit: Any, matrix: Any, K: int, after: bool, threads: int, out: Any
) -> None:
    """:func:`turn_rows` for all rows, on so many threads."""
    rows = len(x)
    for index in prange(threads):
        start, stop = share(index, threads, rows)
        turn_rows(x, scale, unit, matrix, K, after, start, stop, out)
