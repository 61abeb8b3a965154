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
from modulora_core.kernels.shares import share

LANES = 16  # coordinates that are computed at once
OUTPUTS = 8  # segments that are summed at once

_LANE, _INDEX = ir.IntType(32), ir.IntType(64)


def _vector(context: Any, kind: Any) -> ir.VectorType:
    return ir.VectorType(context.get_data_type(kind.dtype), LANES)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, of: ir.Type) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), of.as_pointer())


def _align(kind: Any) -> int:
    """What numpy promises: that of one value."""
    return int(kind.dtype.bitwidth // 8)


@intrinsic
def _walsh_vectors(_context: Any, x: Any, before: Any, row: Any, _n: Any) -> Any:
    """``x ⊙ before``, of ``n`` coordinates, a multiple of 16, and the transform of order 16 of each sixteen of them, to ``row``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, n = signature.args, arguments[3]
        vector, align = _vector(context, kinds[0]), _align(kinds[0])
        with cgutils.for_range(builder, builder.sdiv(n, _INDEX(LANES))) as loop:
            at = builder.mul(loop.index, _INDEX(LANES))
            source, factors, target = (
                _pointer(context, builder, kind, array, at, vector)
                for kind, array in zip(kinds[:3], arguments[:3], strict=True)
            )
            v = builder.fmul(builder.load(source, align=align), builder.load(factors, align=align))
            for half in (1, 2, 4, 8):
                partner = ir.Constant(ir.VectorType(_LANE, LANES), [i ^ half for i in range(LANES)])
                sign = ir.Constant(vector, [-1.0 if i & half else 1.0 for i in range(LANES)])
                swapped = builder.shuffle_vector(v, v, partner)
                v = builder.fadd(swapped, builder.fmul(v, sign, flags=("contract",)), flags=("contract",))
            builder.store(v, target, align=align)
        return context.get_dummy_value()

    return types.void(x, before, row, types.int64), generate


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


@jit(borrows=True)
def _walsh_rest(row: Any, n: int, m: int) -> None:
    """Of the transforms of order m of a row's segments what is left after those of order 16; m is 16 or more."""
    h = LANES
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
        row[i] = x[i] * before[i]
    h = 1
    while h < m:
        for i in range(0, n, 2 * h):
            for j in range(i, i + h):
                a, b = row[j], row[j + h]
                row[j], row[j + h] = a + b, a - b
        h *= 2


@intrinsic
def _eight_sums(
    _context: Any, matrix: Any, _at: Any, _K: Any, x: Any, _first: Any, _step: Any, out: Any, _to: Any, _count: Any
) -> Any:  # fmt: skip
    """``out[to + step i + l] = Σ_a matrix[at + 8 a + i] · x[first + step a + l]`` for i < ``count``, at most 8, and l < 16.

    The sum goes over a < K, in order. A vector of x is a whole line, so nothing is gained by putting them side by side first.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        matrix, at, K, x, first, step, out, to, count = arguments
        kinds = signature.args
        kind = kinds[0]
        vector = _vector(context, kind)
        totals = [cgutils.alloca_once(builder, vector) for _ in range(OUTPUTS)]
        for total in totals:  # an alloca is made where the function begins, and this may be in a loop
            builder.store(ir.Constant(vector, [0.0] * LANES), total)
        all_lanes = ir.Constant(ir.VectorType(_LANE, LANES), [0] * LANES)
        with cgutils.for_range(builder, K) as loop:
            a = loop.index
            source = builder.add(first, builder.mul(a, step))
            values = builder.load(_pointer(context, builder, kinds[3], x, source, vector), align=_align(kind))
            panel = builder.add(at, builder.mul(a, _INDEX(OUTPUTS)))
            for i, total in enumerate(totals):
                index = builder.add(panel, _INDEX(i))
                factor = builder.load(_pointer(context, builder, kind, matrix, index, vector.element))
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, _LANE(0))
                product = builder.fmul(
                    builder.shuffle_vector(one, one, all_lanes), values, flags=("contract",)
                )
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        for i, total in enumerate(totals):
            with builder.if_then(builder.icmp_signed("<", _INDEX(i), count)):
                index = builder.add(to, builder.mul(step, _INDEX(i)))
                target = _pointer(context, builder, kinds[6], out, index, vector)
                builder.store(builder.load(total), target, align=_align(kind))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(matrix, i64, i64, x, i64, i64, out, i64, i64), generate


@jit(borrows=True)
def _across(row: Any, matrix: Any, K: int, m: int, out: Any) -> None:
    """``out[b m + t] = Σ_a M[a, b] row[a m + t]``, 16 of t at once; m is a multiple of 16."""
    for t in range(0, m, LANES):
        for b in range(0, K, OUTPUTS):
            _eight_sums(matrix, b * K, K, row, t, m, out, b * m + t, min(OUTPUTS, K - b))


@jit(borrows=True)
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


@jit(borrows=True)
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
        scratch: ``[n + 8]``.
        out: ``[rows, n]``: ``x`` itself, or no part of it.
    """
    n = x.shape[1]
    m = n // K
    sums = scratch[n:]
    for r in range(start, stop):
        target = out[r]
        row = target if K == 1 else scratch[:n]
        if m >= LANES:
            _walsh_vectors(x[r], before, row, n)
            _walsh_rest(row, n, m)
        else:
            _walsh_few(x[r], before, row, n, m)
        if K > 1 and m >= LANES:
            _across(row, matrix, K, m, target)
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
        start, stop = share(piece, pieces, rows)
        rotate_rows(x, before, matrix, K, after, start, stop, scratch[piece], out)
