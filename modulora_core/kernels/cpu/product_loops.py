"""The inner loops of products, in kernels that numba compiles: sums of sixteen lanes, or of eight, that stay in registers.

    add_products    sums += X · Wᵀ     along the columns of both: each sum is of the lanes of one vector
    add_rows        sums += Y · W      along the rows of W: each sum is a vector of columns

Both sides are fp32, or both bf16, whose arrays hold the bits as int16; sums are fp32. Numbers of bf16 are multiplied in pairs, of
neighbouring columns or of neighbouring rows: by one instruction where there is one (AVX-512 BF16, 32 products at once; it takes subnormal
numbers for 0), elsewhere after either half of each pair was made fp32.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels.cpu.vectors import (
    LANES,
    assembly,
    has,
    loops,
    matrix,
    multiply_add,
    splat,
    sum_of_lanes,
    zeros,
)

BLOCK = 4
"""Rows that are multiplied at once, of either side."""

AT_ONCE = 4
"""Terms of each sum between two turns of a loop: what a turn counts and compares takes the multipliers' places on some processors."""

PAIR = 2
"""Rows of Ŵ by which a single row of X is multiplied: two of 2048 columns fit the L1 cache beside it."""

_FLOAT, _LANE, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_LANE, LANES)
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)

# of two rows of 32 numbers of 16 bits: the pairs that the processor interleaves within 128 bits, which is one instruction,
# and where the columns of two sums of such pairs are
_LOW_PAIRS = [
    row * 2 * LANES + group + k for group in range(0, 32, 8) for k in range(4) for row in (0, 1)
]
_HIGH_PAIRS = [lane + 4 for lane in _LOW_PAIRS]
_COLUMNS = [(k // 4 % 2) * LANES + k // 8 * 4 + k % 4 for k in range(2 * LANES)]


def _is_bf16(kind: Any) -> bool:
    """Whether an array of this numba type holds the bits of bf16 numbers."""
    return kind.dtype is types.int16


def step(kind: Any) -> int:
    """How many values of an array of this numba type one vector holds; columns must be a multiple of that."""
    return 2 * LANES if _is_bf16(kind) else LANES


def _load(builder: Any, data: Any, index: Any, of: ir.VectorType) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [index]), of.as_pointer()), align=2)


def _add(context: Any, builder: Any, total: Any, a: Any, b: Any) -> None:
    """``total += a · b``, of numbers, or of sixteen pairs of bf16 in words of 32 bits."""
    if a.type != _WORDS:
        multiply_add(builder, total, a, b)
    elif has(context, "avx512bf16"):
        operands = [builder.load(total), a, b]
        builder.store(
            assembly(builder, "vdpbf16ps $3, $2, $0", _VECTOR, operands, "=v,0,v,v"), total
        )
    else:
        for half in (_low_half, _high_half):
            multiply_add(builder, total, half(builder, a), half(builder, b))


def _low_half(builder: Any, words: Any) -> Any:
    return builder.bitcast(builder.shl(words, ir.Constant(_WORDS, [16] * LANES)), _VECTOR)


def _high_half(builder: Any, words: Any) -> Any:
    return builder.bitcast(builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * LANES)), _VECTOR)


def _row(builder: Any, data: Any, row_length: Any, first: Any, i: int, column: Any) -> Any:
    """Where row ``first + i`` has its ``column``."""
    at = builder.mul(builder.add(first, _INDEX(i)), row_length)
    return builder.gep(data, [builder.add(at, column)])


def _add_to(builder: Any, place: Any, more: Any) -> None:
    place = builder.bitcast(place, more.type.as_pointer())
    builder.store(builder.fadd(builder.load(place, align=4), more), place, align=4)


def _products(rows: int, others: int) -> Any:
    """The intrinsic that multiplies ``rows`` rows of x by ``others`` of w."""

    @intrinsic
    def add_products(  # numba's types of the arguments, of which those of numbers are not read
        _context: Any, x: Any, _r: Any, _x_start: Any, w: Any, _o: Any, _w_start: Any, _columns: Any, sums: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, r, x_start, w, o, w_start, columns, sums = arguments
            kinds = signature.args
            x_data, x_length = matrix(context, builder, kinds[0], x)
            w_data, w_length = matrix(context, builder, kinds[3], w)
            to, to_length = matrix(context, builder, kinds[7], sums)
            x_rows = [_row(builder, x_data, x_length, r, i, x_start) for i in range(rows)]
            w_rows = [_row(builder, w_data, w_length, o, k, w_start) for k in range(others)]
            lanes, together = (LANES, others) if rows == 1 else _block(context)
            of, at_once = ir.VectorType(_FLOAT, lanes), _INDEX(lanes)
            if _is_bf16(kinds[0]):
                lanes, of, at_once = LANES, _WORDS, _INDEX(2 * LANES)
            # a multiplier waits four cycles for its own result: fewer than eight sums are made in parts
            parts = max(1, 2 * BLOCK // (rows * others))
            totals = [[zeros(builder, parts, lanes) for _ in range(others)] for _ in range(rows)]
            for first in range(0, others, together):
                for width, vector in loops(
                    builder, builder.sdiv(columns, at_once), max(AT_ONCE, parts)
                ):
                    for part in range(width):
                        index = builder.mul(builder.add(vector, _INDEX(part)), at_once)
                        values = [_load(builder, row, index, of) for row in x_rows]
                        for k in range(first, first + together):
                            weights = _load(builder, w_rows[k], index, of)
                            for i, value in enumerate(values):
                                _add(context, builder, totals[i][k][part % parts], value, weights)
            found = [[_sum(builder, parts) for parts in of_row] for of_row in totals]
            for i, more in enumerate(_sums_of_rows(builder, found)):
                _add_to(builder, _row(builder, to, to_length, r, i, o), more)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(x, i64, i64, w, i64, i64, i64, sums), generate

    return add_products


def _block(context: Any) -> tuple[int, int]:
    """How many lanes a sum has, and by how many rows of w four rows of x are multiplied at once: as many sums as registers hold.

    Sixteen sums and what is multiplied take 24 of AVX-512's 32 registers; eight sums of half the size take 14 of AVX2's 16, and as many
    loads as the multipliers can use; others have smaller ones.
    """
    if has(context, "avx512f"):
        return LANES, BLOCK
    return LANES // 2, 2 if has(context, "avx2") or has(context, "neon") else 1


def _sum(builder: Any, parts: list[Any]) -> Any:
    """The sum of some sums, with sixteen lanes, of which the last may be 0."""
    found = functools.reduce(builder.fadd, [builder.load(part) for part in parts])
    if found.type == _VECTOR:
        return found
    nothing = ir.Constant(found.type, [0.0] * found.type.count)
    return builder.shuffle_vector(
        found, nothing, ir.Constant(ir.VectorType(_LANE, LANES), list(range(LANES)))
    )


def _sums_of_rows(builder: Any, found: list[list[Any]]) -> list[Any]:
    """The sums of the lanes of some vectors a row, as one vector a row."""
    if len(found) == BLOCK:
        sums = _sum_of_each(builder, [value for row in found for value in row])
        lanes = [
            ir.Constant(ir.VectorType(_LANE, BLOCK), list(range(i, i + BLOCK)))
            for i in range(0, LANES, BLOCK)
        ]
        return [builder.shuffle_vector(sums, sums, mask) for mask in lanes]
    rows = []
    for row in found:
        sums = ir.Constant(ir.VectorType(_FLOAT, len(row)), ir.Undefined)
        for k, value in enumerate(row):
            sums = builder.insert_element(sums, sum_of_lanes(builder, value), _LANE(k))
        rows.append(sums)
    return rows


def _sum_of_each(builder: Any, values: list[Any]) -> Any:
    """The sums of the lanes of sixteen vectors, as one vector in their order.

    At each step two vectors become one, of which either half of every group of lanes is from one of the two.
    """
    half = LANES // 2
    while half:
        low = sorted(
            (lane for lane in range(2 * LANES) if not lane & half),
            key=functools.partial(_place, half),
        )
        masks = [
            ir.Constant(ir.VectorType(_LANE, LANES), lanes)
            for lanes in (low, [lane + half for lane in low])
        ]
        pairs = zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True)
        values = [
            builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks)) for a, b in pairs
        ]
        half //= 2
    return values[0]


def _place(half: int, lane: int) -> tuple[int, int, int]:
    """Where a lane of two vectors goes: by its group, then by its vector."""
    return lane % LANES // (2 * half), lane // LANES, lane % half


def _rows(rows: int) -> Any:
    """The intrinsic that adds rows of w, times the factors in ``rows`` rows of y."""

    @intrinsic
    def add_rows(
        _context: Any, y: Any, _r: Any, _first: Any, _count: Any, w: Any, _w_start: Any, _columns: Any, sums: Any, _to: Any,
        _start: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            y, r, first, count, w, w_start, columns, sums, row, start = arguments
            kinds = signature.args
            y_data, y_length = matrix(context, builder, kinds[0], y)
            w_data, w_length = matrix(context, builder, kinds[4], w)
            to, to_length = matrix(context, builder, kinds[7], sums)
            w_data = builder.gep(w_data, [w_start])
            factors = [_row(builder, y_data, y_length, r, i, first) for i in range(rows)]
            targets = [_row(builder, to, to_length, row, i, start) for i in range(rows)]
            at_once = _INDEX(step(kinds[4]))
            # as many columns as leave registers for the sums
            most = BLOCK * LANES // step(kinds[4]) if has(context, "avx512f") or rows == 1 else 1
            for width, vector in loops(builder, builder.sdiv(columns, at_once), most):
                offset = builder.mul(vector, at_once)
                add = _add_pairs_of_rows if _is_bf16(kinds[4]) else _add_each_row
                add(context, builder, factors, count, w_data, w_length, offset, targets, width)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(y, i64, i64, i64, w, i64, i64, sums, i64, i64), generate

    return add_rows


def _add_each_row(
    context: Any, builder: Any, factors: list[Any], count: Any, w: Any, w_length: Any, offset: Any, targets: list[Any], width: int
) -> None:  # fmt: skip
    """``width`` vectors of columns of all the rows, from ``offset`` on."""
    totals = [zeros(builder, width) for _ in factors]
    for rows, first in loops(builder, count, AT_ONCE):
        at = builder.add(builder.mul(first, w_length), offset)
        for r in range(rows):
            weights = [
                _load(builder, w, builder.add(at, _INDEX(k * LANES)), _VECTOR) for k in range(width)
            ]
            _add_products_of_factors(
                context, builder, totals, factors, builder.add(first, _INDEX(r)), weights
            )
            at = builder.add(at, w_length)
    for of_row, target in zip(totals, targets, strict=True):
        for k, total in enumerate(of_row):
            place = builder.gep(target, [builder.add(offset, _INDEX(k * LANES))])
            _add_to(builder, place, builder.load(total))


def _add_pairs_of_rows(
    context: Any, builder: Any, factors: list[Any], count: Any, w: Any, w_length: Any, offset: Any, targets: list[Any], width: int
) -> None:  # fmt: skip
    """The same of bf16, of two rows at once: the last may be beyond ``count``. A vector of columns has two sums."""
    totals = [zeros(builder, 2 * width) for _ in factors]
    pairs = builder.sdiv(builder.add(count, _INDEX(1)), _INDEX(2))
    with cgutils.for_range(builder, pairs) as loop:
        row = builder.mul(loop.index, _INDEX(2))
        at = builder.add(builder.mul(row, w_length), offset)
        weights = []
        for k in range(width):
            two = [_load(builder, w, builder.add(start, _INDEX(2 * k * LANES)), _HALVES)
                   for start in (at, builder.add(at, w_length))]  # fmt: skip
            for mask in (_LOW_PAIRS, _HIGH_PAIRS):
                lanes = ir.Constant(ir.VectorType(_LANE, len(mask)), mask)
                weights.append(builder.bitcast(builder.shuffle_vector(*two, lanes), _WORDS))
        _add_products_of_factors(context, builder, totals, factors, row, weights)
    columns = ir.Constant(ir.VectorType(_LANE, len(_COLUMNS)), _COLUMNS)
    for of_row, target in zip(totals, targets, strict=True):
        for k in range(width):
            low, high = (builder.load(total) for total in of_row[2 * k : 2 * k + 2])
            place = builder.gep(target, [builder.add(offset, _INDEX(2 * k * LANES))])
            _add_to(builder, place, builder.shuffle_vector(low, high, columns))


def _add_products_of_factors(
    context: Any,
    builder: Any,
    totals: list[list[Any]],
    factors: list[Any],
    row: Any,
    weights: list[Any],
) -> None:
    """Add the weights, times each row's factor for them, to its totals."""
    of = weights[0].type
    for of_row, place in zip(totals, factors, strict=True):
        at = builder.bitcast(builder.gep(place, [row]), of.element.as_pointer())
        factor = splat(builder, builder.load(at, align=2), of)
        for total, value in zip(of_row, weights, strict=True):
            _add(context, builder, total, factor, value)


add_products_of_one, add_products_of_four = _products(1, PAIR), _products(BLOCK, BLOCK)
"""``(x, r, x_start, w, o, w_start, columns, sums)``: add ``x[r:, x_start:] · w[o:, w_start:]ᵀ`` over so many columns, a multiple of
:func:`step`, to ``sums[r:, o:]``: for one row of x and two of w, or for four and four. All arrays are ``[rows, columns]``, C-contiguous."""

add_rows_of_one, add_rows_of_four = _rows(1), _rows(BLOCK)
"""``(y, r, first, count, w, w_start, columns, sums, row, start)``: add ``y[r:, first : first + count] · w[:count, w_start:]`` for so
many columns, a multiple of :func:`step`, to ``sums[row:, start:]``, for one or four rows of y. Rows of bf16 are added in pairs: where
``count`` is odd, w has one more, of zeros, and y one more finite column."""
