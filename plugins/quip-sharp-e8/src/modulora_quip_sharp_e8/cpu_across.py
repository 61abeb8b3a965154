"""Across the segments of a row: the matrix of order K of the orthogonal transform, compiled by numba.

    out[b m + t] = Σ_a M[a, b] row[a m + t]        for b < K, t < m

The entries of a Hadamard matrix are ±1. Its segments are taken four at a time: their sums with all sixteen choices of signs go to a table,
and what the four give to an output is one entry of it (the method of four Russians: Arlazarov, Dinic, Kronrod, Faradžev 1970). So a
coordinate takes K / 4 additions, and four entries of tables that are written, instead of K multiplications. Any other M, and segments of
fewer than sixteen coordinates, are multiplied as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import on_stack
from modulora_core.kernels.cpu.ir import LANES, multiply_add, pointer, splat, zeros

OUTPUTS = 8  # segments that are summed at once
_SIGNS = 16  # of four segments
_FOURS = 8  # tables that are kept at once: 16 KiB of fp32, so that they stay in the L1 cache

LANE, INDEX = ir.IntType(32), ir.IntType(64)

_tables32, _tables64 = (
    on_stack(_FOURS * _SIGNS * 2 * LANES, dtype) for dtype in (np.float32, np.float64)
)
_sums32, _sums64 = (on_stack(OUTPUTS, dtype) for dtype in (np.float32, np.float64))


def _vector_of(context: Any, kind: Any) -> ir.VectorType:
    """:data:`LANES` values of an array of numba's type ``kind``."""
    return ir.VectorType(context.get_data_type(kind.dtype), LANES)


def _alignment(kind: Any) -> int:
    """What numpy promises: that of one value."""
    return int(kind.dtype.bitwidth // 8)


def load(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """The :data:`LANES` values of an array, of numba's type ``kind``, from ``index`` on."""
    place = pointer(context, builder, kind, array, index, _vector_of(context, kind))
    return builder.load(place, align=_alignment(kind))


def store(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> None:
    """Puts them there."""
    builder.store(
        vector, pointer(context, builder, kind, array, index, vector.type), align=_alignment(kind)
    )


@intrinsic
def _sums_of_four(
    _context: Any, x: Any, _first: Any, _step: Any, table: Any, _at: Any, _stride: Any
) -> Any:
    """``table[at + stride e + l] = Σ_i ± x[first + step i + l]`` for i < 4, l < 16 and e < 16: minus where bit i of e is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, first, step, table, at, stride = arguments
        kind, to = signature.args[0], signature.args[3]
        places = [builder.add(first, builder.mul(step, INDEX(i))) for i in range(4)]
        a, b, c, d = (load(context, builder, kind, x, place) for place in places)
        r, s = builder.fadd(c, d), builder.fsub(c, d)
        entries = {}
        for e, front in ((0, builder.fadd(a, b)), (2, builder.fsub(a, b))):
            entries[e], entries[e + 4] = builder.fadd(front, r), builder.fsub(front, s)
            entries[e + 8], entries[e + 12] = builder.fadd(front, s), builder.fsub(front, r)
        for e in range(0, _SIGNS, 2):
            entries[15 - e] = builder.fneg(entries[e])
        for e, entry in entries.items():
            place = builder.add(at, builder.mul(stride, INDEX(e)))
            store(context, builder, to, table, place, entry)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, i64, table, i64, i64), generate


def _adder(vectors: int) -> Any:
    """The intrinsic for outputs of so many vectors: of one four at once, of two two."""
    width, outputs = LANES * vectors, 4 // vectors

    @intrinsic
    def add(
        _context: Any, table: Any, picks: Any, _at: Any, _count: Any, _more: Any, out: Any, _to: Any, _step: Any
    ) -> Any:  # fmt: skip
        """``out[to + step i + l] = Σ_g table[(16 g + e) width + l]``, e being ``picks[at + 4 g + i]``, for g < ``count``.

        For i < ``outputs`` and l < ``width``. Where ``more`` isn't 0, what stands in ``out`` is added to.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            table, picks, at, count, more, out, to, step = arguments
            kind, pick, target = signature.args[0], signature.args[1], signature.args[5]
            places = [
                builder.add(builder.add(to, builder.mul(step, INDEX(i))), INDEX(LANES * v))
                for i in range(outputs)
                for v in range(vectors)
            ]
            totals = zeros(builder, len(places), number=context.get_data_type(kind.dtype))
            with builder.if_then(builder.icmp_signed("!=", more, INDEX(0))):
                for place, total in zip(places, totals, strict=True):
                    builder.store(load(context, builder, target, out, place), total)
            with cgutils.for_range(builder, count) as loop:
                first, tables = (builder.mul(loop.index, INDEX(size)) for size in (4, _SIGNS))
                for i in range(outputs):
                    index = builder.add(builder.add(at, first), INDEX(i))
                    e = builder.load(pointer(context, builder, pick, picks, index, ir.IntType(8)))
                    entry = builder.mul(builder.add(tables, builder.zext(e, INDEX)), INDEX(width))
                    for v, total in enumerate(totals[i * vectors : (i + 1) * vectors]):
                        value = load(
                            context, builder, kind, table, builder.add(entry, INDEX(LANES * v))
                        )
                        builder.store(builder.fadd(builder.load(total), value), total)
            for place, total in zip(places, totals, strict=True):
                store(context, builder, target, out, place, builder.load(total))
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(table, picks, i64, i64, i64, out, i64, i64), generate

    return add


_add_one, _add_two = _adder(1), _adder(2)


@jit(borrows=True)
def _across_signs(row: Any, picks: Any, K: int, m: int, tables: Any, out: Any) -> None:
    """For a Hadamard matrix and m of 16 or more."""
    wide = min(m, 2 * LANES)
    for t in range(0, m, wide):
        for first in range(0, K, 4 * _FOURS):
            fours = min(_FOURS, (K - first) // 4)
            for g in range(fours):
                for v in range(0, wide, LANES):
                    _sums_of_four(
                        row, (first + 4 * g) * m + t + v, m, tables, g * _SIGNS * wide + v, wide
                    )
            if wide == LANES:
                for b in range(0, K, 4):
                    _add_one(tables, picks, b * K // 4 + first, fours, first, out, b * m + t, m)
            else:
                for b in range(0, K, 2):
                    _add_two(
                        tables, picks, b // 4 * K + b % 4 + first, fours, first, out, b * m + t, m
                    )


@intrinsic
def _eight_sums(
    _context: Any, matrix: Any, _at: Any, _K: Any, x: Any, _first: Any, _step: Any, out: Any, _to: Any, _count: Any
) -> Any:  # fmt: skip
    """``out[to + step i + l] = Σ_a matrix[at + 8 a + i] · x[first + step a + l]`` for i < ``count``, at most 8, and l < 16.

    The sum goes over a < K, in order. A vector of x is a whole line, so nothing is gained by putting them side by side first.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        matrix, at, K, x, first, step, out, to, count = arguments
        kind, given, target = signature.args[0], signature.args[3], signature.args[6]
        vector = _vector_of(context, kind)
        totals = zeros(builder, OUTPUTS, number=vector.element)
        with cgutils.for_range(builder, K) as loop:
            values = load(
                context, builder, given, x, builder.add(first, builder.mul(loop.index, step))
            )
            panel = builder.add(at, builder.mul(loop.index, INDEX(OUTPUTS)))
            for i, total in enumerate(totals):
                index = builder.add(panel, INDEX(i))
                factor = builder.load(
                    pointer(context, builder, kind, matrix, index, vector.element)
                )
                multiply_add(builder, total, splat(builder, factor, vector), values)
        for i, total in enumerate(totals):
            with builder.if_then(builder.icmp_signed("<", INDEX(i), count)):
                place = builder.add(to, builder.mul(step, INDEX(i)))
                store(context, builder, target, out, place, builder.load(total))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(matrix, i64, i64, x, i64, i64, out, i64, i64), generate


@jit(borrows=True)
def _across_matrix(row: Any, matrix: Any, K: int, m: int, out: Any) -> None:
    """For any M and m of 16 or more: 16 of t at once."""
    for t in range(0, m, LANES):
        for b in range(0, K, OUTPUTS):
            _eight_sums(matrix, b * K, K, row, t, m, out, b * m + t, min(OUTPUTS, K - b))


@jit(borrows=True)
def _across_few(row: Any, matrix: Any, K: int, m: int, sums: Any, out: Any) -> None:
    """For any M, and any m: eight of b at once."""
    for t in range(m):
        for b in range(0, K, OUTPUTS):
            sums[:] = 0
            for a in range(K):
                factor = row[a * m + t]
                for i in range(OUTPUTS):
                    sums[i] += factor * matrix[(b * K + a * OUTPUTS) + i]
            for i in range(min(OUTPUTS, K - b)):
                out[(b + i) * m + t] = sums[i]


def across(row: Any, matrix: Any, K: int, m: int, out: Any) -> None:
    """What this module says of one row, in kernels.

    Args:
        row: ``[n]``, fp32 or fp64.
        matrix: M, of which :func:`modulora_quip_sharp_e8.transform.laid_out` says how it is laid out.
        K: its order; n = K · m.
        out: ``[n]``, no part of ``row``.
    """
    raise NotImplementedError("across() is for kernels that numba compiles")


@overload(across, inline="always")  # inlined, it counts no references to arrays
def _across_of(row: Any, matrix: Any, K: int, m: int, out: Any) -> Any:  # noqa: ARG001 - numba compares the names
    tables, sums = (_tables32, _sums32) if row.dtype == types.float32 else (_tables64, _sums64)

    def of_signs(row: Any, matrix: Any, K: int, m: int, out: Any) -> None:
        _across_signs(row, matrix, K, m, tables(), out)

    def of_numbers(row: Any, matrix: Any, K: int, m: int, out: Any) -> None:
        if m >= LANES:
            _across_matrix(row, matrix, K, m, out)
        else:
            _across_few(row, matrix, K, m, sums(), out)

    return of_signs if matrix.dtype == types.uint8 else of_numbers
