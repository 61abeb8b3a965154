"""The orthogonal transform on the CPU, compiled by numba: a row at a time, in the L1 or L2 cache.

A row of n = K · m coordinates, m a power of two, is K segments: a fast Walsh–Hadamard transform of each segment, then the
matrix of order K across the segments. Rows are shared out to threads and don't know of each other: a row's
bits are the same in whatever company it comes.

LLVM doesn't find vectors in butterflies of 1, 2, 4, 8 coordinates, nor keep sums of a matrix product in registers:
those are spelled, in terms that any processor's instructions can be made from.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit

LANES = 16  # coordinates that are computed at once
OUTPUTS = 8  # segments that are summed at once

_LANE = ir.IntType(32)


def _vector(context: Any, kind: Any) -> ir.VectorType:
    return ir.VectorType(context.get_data_type(kind.dtype), LANES)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, of: ir.Type) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), of.as_pointer())


def _align(kind: Any) -> int:
    """What numpy promises: that of one value."""
    return int(kind.dtype.bitwidth // 8)


@intrinsic
def _walsh_vector(_context: Any, x: Any, at: Any) -> Any:
    """The transform of order 16 of ``x[at : at + 16]``, in place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        vector = _vector(context, kind)
        pointer = _pointer(context, builder, kind, arguments[0], arguments[1], vector)
        v = builder.load(pointer, align=_align(kind))
        for half in (1, 2, 4, 8):
            partner = ir.Constant(ir.VectorType(_LANE, LANES), [i ^ half for i in range(LANES)])
            sign = ir.Constant(vector, [-1.0 if i & half else 1.0 for i in range(LANES)])
            swapped = builder.shuffle_vector(v, v, partner)
            v = builder.fadd(swapped, builder.fmul(v, sign, flags=("contract",)), flags=("contract",))
        builder.store(v, pointer, align=_align(kind))
        return context.get_dummy_value()

    return types.void(x, at), generate


def _butterflies(order: int) -> Any:
    """The intrinsic for so many vectors at once, a power of two."""

    @intrinsic
    def butterfly(_context: Any, x: Any, at: Any, step: Any) -> Any:
        """The transform of that order across vectors at ``at``, ``at + step``, ``at + 2 step``, ..., in place."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array, at, step = arguments
            kind = signature.args[0]
            pointers = []
            for _ in range(order):
                pointers.append(_pointer(context, builder, kind, array, at, _vector(context, kind)))
                at = builder.add(at, step)
            values = [builder.load(p, align=_align(kind)) for p in pointers]
            half = 1
            while half < order:
                for i in range(order):
                    if not i & half:
                        a, b = values[i], values[i | half]
                        values[i], values[i | half] = builder.fadd(a, b), builder.fsub(a, b)
                half *= 2
            for value, pointer in zip(values, pointers, strict=True):
                builder.store(value, pointer, align=_align(kind))
            return context.get_dummy_value()

        return types.void(x, at, step), generate

    return butterfly


_two, _four, _eight = (_butterflies(order) for order in (2, 4, 8))


@jit()
def _walsh(x: Any, at: int, m: int) -> None:
    """The transform of order m, a power of two, of ``x[at : at + m]``, in place, without its 1/√m."""
    h = 1
    if m >= LANES:
        for i in range(at, at + m, LANES):
            _walsh_vector(x, i)
        h = LANES
        while 8 * h <= m:
            for i in range(at, at + m, 8 * h):
                for j in range(i, i + h, LANES):
                    _eight(x, j, h)
            h *= 8
        if 4 * h == m:
            for j in range(at, at + h, LANES):
                _four(x, j, h)
        elif 2 * h == m:
            for j in range(at, at + h, LANES):
                _two(x, j, h)
        return
    while h < m:
        for i in range(at, at + m, 2 * h):
            for j in range(i, i + h):
                a, b = x[j], x[j + h]
                x[j], x[j + h] = a + b, a - b
        h *= 2


@intrinsic
def _eight_sums(_context: Any, matrix: Any, at: Any, K: Any, columns: Any, sums: Any) -> Any:
    """``sums[16 i + l] = Σ_a matrix[at + 8 a + i] · columns[16 a + l]`` for i < 8, l < 16, over a < K in order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        matrix, at, K, columns, sums = arguments
        kind = signature.args[0]
        vector = _vector(context, kind)
        totals = [
            cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES)) for _ in range(OUTPUTS)
        ]
        for total in totals:  # an alloca is set where the function begins, and this may be in a loop
            builder.store(ir.Constant(vector, [0.0] * LANES), total)
        all_lanes = ir.Constant(ir.VectorType(_LANE, LANES), [0] * LANES)
        with cgutils.for_range(builder, K) as loop:
            a = loop.index
            source = builder.mul(a, ir.Constant(a.type, LANES))
            x = builder.load(
                _pointer(context, builder, signature.args[3], columns, source, vector), align=_align(kind)
            )
            first = builder.add(at, builder.mul(a, ir.Constant(a.type, OUTPUTS)))
            for i, total in enumerate(totals):
                index = builder.add(first, ir.Constant(first.type, i))
                factor = builder.load(_pointer(context, builder, kind, matrix, index, vector.element))
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, _LANE(0))
                product = builder.fmul(builder.shuffle_vector(one, one, all_lanes), x, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        for i, total in enumerate(totals):
            index = ir.Constant(at.type, i * LANES)
            target = _pointer(context, builder, signature.args[4], sums, index, vector)
            builder.store(builder.load(total), target, align=_align(kind))
        return context.get_dummy_value()

    return types.void(matrix, at, K, columns, sums), generate


@jit()
def _across(x: Any, matrix: Any, K: int, m: int, columns: Any, sums: Any, out: Any) -> None:
    """``out[b m + t] = Σ_a M[a, b] x[a m + t]``, 16 of t at once; m is a multiple of 16.

    ``columns`` has room for K · 16, ``sums`` for 8 · 16: the columns at hand, side by side, because whole rows
    of them would fall on few lines of the cache.
    """
    for t in range(0, m, LANES):
        for a in range(K):
            for lane in range(LANES):
                columns[a * LANES + lane] = x[a * m + t + lane]
        for b in range(0, K, OUTPUTS):
            _eight_sums(matrix, b * K, K, columns, sums)
            for i in range(min(OUTPUTS, K - b)):
                for lane in range(LANES):
                    out[(b + i) * m + t + lane] = sums[i * LANES + lane]


@jit()
def _across_few(x: Any, matrix: Any, K: int, m: int, sums: Any, out: Any) -> None:
    """The same for m below 16: eight of b at once."""
    for t in range(m):
        for b in range(0, K, OUTPUTS):
            sums[:OUTPUTS] = 0
            for a in range(K):
                factor = x[a * m + t]
                for i in range(OUTPUTS):
                    sums[i] += factor * matrix[(b * K + a * OUTPUTS) + i]
            for i in range(min(OUTPUTS, K - b)):
                out[(b + i) * m + t] = sums[i]


@jit()
def rotate_rows(
    x: Any, before: Any, matrix: Any, K: int, after: Any, start: int, stop: int, scratch: Any, out: Any
) -> None:
    """``out[r] = ((x[r] ⊙ before) (M ⊗ Sylvester_m)) ⊙ after`` for rows ``[start, stop)``, on this thread.

    Args:
        x: ``[rows, n]``, fp32 or fp64, as all others are.
        before: ``[n]``, with the factor that makes the transform orthogonal.
        matrix: M, ``[K, K]`` in panels of eight columns: M[a, b] is at (b − b mod 8) · K + 8a + b mod 8. Not read for K = 1.
        K: order of M; n = K · m.
        after: ``[n]``, or of length 0 for none.
        start, stop: which rows.
        scratch: ``[n + (K + 8) · 16]``.
        out: ``[rows, n]``, no part of ``x``.
    """
    n = x.shape[1]
    m = n // K
    columns, sums = scratch[n : n + K * LANES], scratch[n + K * LANES :]
    for r in range(start, stop):
        source, target = x[r], out[r]
        row = target if K == 1 else scratch[:n]
        for i in range(n):
            row[i] = source[i] * before[i]
        for segment in range(K):
            _walsh(row, segment * m, m)
        if K > 1 and m >= LANES:
            _across(row, matrix, K, m, columns, sums, target)
        elif K > 1:
            _across_few(row, matrix, K, m, sums, target)
        if after.size:
            for i in range(n):
                target[i] *= after[i]


@jit(parallel=True)
def rotate(x: Any, before: Any, matrix: Any, K: int, after: Any, scratch: Any, out: Any) -> None:
    """:func:`rotate_rows` for all rows, on as many threads as there are rows of ``scratch``."""
    rows, pieces = len(x), len(scratch)
    for piece in prange(pieces):
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        rotate_rows(x, before, matrix, K, after, start, stop, scratch[piece], out)
