"""The inner loops of products of many rows, in kernels that numba compiles: blocks of sums that fill the registers.

    add_block        C += A B      A : rows, whose numbers are spread over a vector   B, C : rows of vectors
    put_transposed   B = Aᵀ        a square of vectors at a time

A matrix product is bound by its multiplications where each vector that is loaded takes part in many: a block of :func:`block_rows` rows by
:func:`block_columns` columns loads two vectors, and one number a row, for two multiplications a row. That is the way of Goto and van
de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), and of BLIS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels.cpu.prefetch import FAR, NEAR, ask_for
from modulora_core.kernels.cpu.vectors import has, matrix, multiply_add, pointer, splat, zeros

DEPTH = 256
"""Terms of a sum that are added in registers: a panel of so many rows of B, 32 KiB, stays in the L1 cache while the rows of A go by."""

PART = 2 * DEPTH
"""Columns of A that are in one array."""

ROW = PART + 16
"""How far two rows of A are apart, in numbers: with what is between them they don't share lines of the L1 cache. A number that is known
when the kernel is compiled is a part of the instruction that loads; to compute addresses took a fifth of the time."""

STEP = 8
"""Terms between two lines that are asked for ahead, and in one turn of the loop. All lines at once would have what is needed now wait
behind them; to count and compare for each term took the multipliers a sixteenth of their time (docs/performance-findings.md)."""

RUN = 256
"""Numbers that are asked for side by side: sixteen lines."""

_VECTORS = 2  # of a block's row
_FLOAT, _BYTE, _LANE, _INDEX = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LINE, _NUMBERS = 64, 16  # bytes of a line, and numbers


def _lanes(context: Any) -> int:
    """Of a vector: as many as a register has."""
    if has(context, "avx512f"):
        return 16
    return 8 if has(context, "avx2") else 4


def _rows(context: Any) -> int:
    """Of a block: its sums, what is loaded and a number are all in registers, of which AVX-512 and NEON have 32 and others 16."""
    if has(context, "avx512f") or has(context, "neon"):
        return 14
    return 6


def _constant(of: Callable[[Any], int]) -> Any:
    """``()``, in a kernel: what ``of`` says of the processor that it is compiled for."""

    @intrinsic
    def number(_context: Any) -> Any:
        def generate(context: Any, _builder: Any, _signature: Any, _arguments: Any) -> Any:
            return _INDEX(of(context))

        return types.int64(), generate

    return number


block_rows = _constant(_rows)
"""``()``: rows of a block of sums."""

block_columns = _constant(lambda context: _VECTORS * _lanes(context))
"""``()``: columns of one."""

square = _constant(_lanes)
"""``()``: rows and columns of what :func:`put_transposed` takes at once. :func:`block_columns` is a multiple of it."""


@intrinsic
def add_block(  # numba's types of the arguments, of which those of numbers are not read
    _context: Any, a: Any, _row: Any, _start: Any, b: Any, _first: Any, _column: Any, _depth: Any, c: Any, _to: Any, _to_column: Any,
    soon: Any, _at: Any, _leap: Any,
) -> Any:  # fmt: skip
    """``c[to :, to_column :] += a[row :, start : start + depth] · b[first : first + depth, column :]``, of one block of sums.

    All are fp32 and C-contiguous; ``a`` has rows of :data:`ROW` numbers. A sum is made from the first term to the last, and added.
    Meanwhile a line for every :data:`STEP` terms is fetched to the L2 cache, as if ``soon`` were flat: :data:`RUN` numbers from ``at`` on,
    as many from ``at + leap`` on and so forth. They may be anywhere.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, row, start, b, first, column, depth, c, to, to_column, soon, at, leap = arguments
        kinds = signature.args
        lanes = _lanes(context)
        of = ir.VectorType(_FLOAT, lanes)

        def vectors(base: Any, index: Any) -> list[Any]:
            places = [
                builder.gep(base, [builder.add(index, _INDEX(k * lanes))]) for k in range(_VECTORS)
            ]
            return [builder.bitcast(place, of.as_pointer()) for place in places]

        a_data, _ = _place(context, builder, kinds[0], a, row, start)
        b_data, b_length = _place(context, builder, kinds[3], b, first, column)
        c_data, c_length = _place(context, builder, kinds[7], c, to, to_column)
        ahead, apart = (
            pointer(context, builder, kinds[10], soon, at, _BYTE),
            builder.mul(leap, _INDEX(4)),
        )
        totals = [zeros(builder, _VECTORS, lanes) for _ in range(_rows(context))]

        def split(index: Any, count: int) -> tuple[Any, Any]:
            return builder.udiv(index, _INDEX(count)), builder.urem(index, _INDEX(count))

        def add_term(row_of_a: Any, row_of_b: Any) -> None:
            values = [builder.load(place, align=4) for place in vectors(row_of_b, _INDEX(0))]
            for i, of_row in enumerate(totals):
                number = builder.load(builder.gep(row_of_a, [_INDEX(i * ROW)]))
                factor = splat(builder, number, of)
                for total, value in zip(of_row, values, strict=True):
                    multiply_add(builder, total, factor, value)

        def add_terms(begin: Any, count: int) -> None:
            row_of_a = builder.gep(a_data, [begin])
            row_of_b = builder.gep(b_data, [builder.mul(begin, b_length)])
            for k in range(count):
                add_term(builder.gep(row_of_a, [_INDEX(k)]), row_of_b)
                row_of_b = builder.gep(row_of_b, [b_length])

        steps = builder.sdiv(depth, _INDEX(STEP))
        with cgutils.for_range(builder, steps) as step:
            run, line = split(step.index, RUN // _NUMBERS)
            byte = builder.add(builder.mul(run, apart), builder.mul(line, _INDEX(_LINE)))
            ask_for(builder, builder.gep(ahead, [byte]), FAR)
            to_row, vector = split(
                step.index, _VECTORS
            )  # of all rows, as there are fewer than half as many as steps
            place = builder.add(builder.mul(to_row, c_length), builder.mul(vector, _INDEX(lanes)))
            ask_for(
                builder, builder.bitcast(builder.gep(c_data, [place]), _BYTE.as_pointer()), NEAR
            )
            add_terms(builder.mul(step.index, _INDEX(STEP)), STEP)
        done = builder.mul(steps, _INDEX(STEP))
        with cgutils.for_range(builder, builder.sub(depth, done)) as rest:
            add_terms(builder.add(done, rest.index), 1)
        for i, of_row in enumerate(totals):
            for total, place in zip(
                of_row, vectors(c_data, builder.mul(c_length, _INDEX(i))), strict=True
            ):
                builder.store(
                    builder.fadd(builder.load(place, align=4), builder.load(total)), place, align=4
                )
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(a, i64, i64, b, i64, i64, i64, c, i64, i64, soon, i64, i64), generate


@intrinsic
def put_transposed(
    _context: Any, a: Any, _row: Any, _column: Any, b: Any, _to: Any, _to_column: Any
) -> Any:
    """``b[to + j, to_column + i] = a[row + i, column + j]``, of one square; both are fp32 and C-contiguous."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, row, column, b, to, to_column = arguments
        size = _lanes(context)
        of = ir.VectorType(_FLOAT, size)

        def rows(data: Any, length: Any) -> list[Any]:
            places = [builder.gep(data, [builder.mul(length, _INDEX(i))]) for i in range(size)]
            return [builder.bitcast(place, of.as_pointer()) for place in places]

        source = rows(*_place(context, builder, signature.args[0], a, row, column))
        target = rows(*_place(context, builder, signature.args[3], b, to, to_column))
        values = _transposed(builder, [builder.load(place, align=4) for place in source])
        for value, place in zip(values, target, strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(a, i64, i64, b, i64, i64), generate


def _place(
    context: Any, builder: Any, kind: Any, array: Any, row: Any, column: Any
) -> tuple[Any, Any]:
    """Where a C-contiguous matrix has a number, and the length of its rows."""
    data, length = matrix(context, builder, kind, array)
    return builder.gep(data, [builder.add(builder.mul(row, length), column)]), length


def _transposed(builder: Any, values: list[Any]) -> list[Any]:
    """A square of vectors, by halves: the last half of the first vectors changes places with the first half of the last, and so on within
    each.
    """
    size = len(values)
    half = size // 2
    while half:
        swapped = list(values)
        for i in (i for i in range(size) if not i & half):
            pair = values[i], values[i + half]
            low = [size + lane - half if lane & half else lane for lane in range(size)]
            high = [size + lane if lane & half else lane + half for lane in range(size)]
            for place, lanes in ((i, low), (i + half, high)):
                mask = ir.Constant(ir.VectorType(_LANE, size), lanes)
                swapped[place] = builder.shuffle_vector(*pair, mask)
        values, half = swapped, half // 2
    return values
