"""Vectors in kernels that numba compiles: what LLVM doesn't find by itself is spelled here, in terms that any processor has.

For :mod:`modulora_core.kernels.products`, the inner loops of products: their sums stay in registers. For plugins, what an intrinsic of
their own begins with: :func:`splat`, :func:`lookup`, :func:`matrix`, :func:`pointer`, :func:`has`, :func:`zeros`, :func:`multiply_add`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Values that are multiplied at once; the processor's registers may be half or a quarter of that."""

BLOCK = 4
"""Rows that are multiplied at once, of either side."""

PAIR = 2
"""Rows of Ŵ by which a single row of X is multiplied: two of 2048 columns fit the L1 cache beside it."""

_FLOAT, _LANE, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def has(context: Any, feature: str) -> bool:
    """Whether code is generated for a processor with ``feature``, in LLVM's words, such as ``"avx2"``."""
    return f"+{feature}" in str(context.codegen().magic_tuple()[2])


def matrix(context: Any, builder: Any, kind: Any, array: Any) -> tuple[Any, Any]:
    """Where a C-contiguous array begins, and the length of its last dimension."""
    made = context.make_array(kind)(context, builder, array)
    return made.data, cgutils.unpack_tuple(builder, made.shape, kind.ndim)[-1]


def pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, of: ir.Type) -> Any:
    """To ``array[index]``, of a C-contiguous array as if it were flat, as a pointer to ``of``."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), of.as_pointer())


def splat(builder: Any, value: Any, of: ir.VectorType) -> Any:
    """A vector whose lanes are all ``value``."""
    one = builder.insert_element(ir.Constant(of, ir.Undefined), value, _LANE(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_LANE, of.count), [0] * of.count))


def lookup(context: Any, builder: Any, table: Any, index: Any) -> Any:
    """``table[index & 15]``, a lane at a time: ``<16 x float>`` by ``<16 x i32>``.

    LLVM doesn't find the lookup in registers by itself, so it is spelled for AVX-512 and AVX2. Elsewhere each lane loads its value.
    """
    if has(context, "avx512f"):
        return _instruction(builder, "llvm.x86.avx512.permvar.sf.512", table, index)
    if has(context, "avx2"):
        return _lookup_by_eights(builder, table, index)
    if isinstance(table, ir.Constant):
        place = cgutils.global_constant(builder, "table", table)
    else:
        place = cgutils.alloca_once(builder, table.type)
        builder.store(table, place)
    values = builder.bitcast(place, _FLOAT.as_pointer())
    found = ir.Constant(_VECTOR, ir.Undefined)
    for lane in range(LANES):
        at = builder.and_(builder.extract_element(index, _LANE(lane)), _LANE(LANES - 1))
        found = builder.insert_element(found, builder.load(builder.gep(values, [at])), _LANE(lane))
    return found


def _lookup_by_eights(builder: Any, table: Any, index: Any) -> Any:
    """By AVX2's, which is of eight values by the low three bits: two of them, and a choice by the fourth."""

    def half(of: Any, first: int) -> Any:
        lanes = list(range(first, first + 8))
        return builder.shuffle_vector(of, of, ir.Constant(ir.VectorType(_LANE, 8), lanes))

    halves = []
    for lanes in (half(index, 0), half(index, 8)):
        low, high = (
            _instruction(builder, "llvm.x86.avx2.permps", half(table, first), lanes) for first in (0, 8)
        )
        bit = builder.and_(lanes, ir.Constant(lanes.type, [8] * 8))
        is_high = builder.icmp_signed("!=", bit, ir.Constant(lanes.type, [0] * 8))
        halves.append(builder.select(is_high, high, low))
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_LANE, LANES), list(range(LANES))))


def _instruction(builder: Any, name: str, table: Any, index: Any) -> Any:
    of = ir.FunctionType(table.type, [table.type, index.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, of, name), [table, index])


def _load(builder: Any, data: Any, index: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer()), align=4)


def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> None:
    """``total += a · b`` for an alloca, which LLVM makes a register; rounded once where the processor can."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


def zeros(builder: Any, count: int) -> list[Any]:
    """So many sums of sixteen lanes each, as allocas, set to 0 where this stands."""
    totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(count)]
    for total in totals:  # an alloca is made where the function begins, and this may be in a loop
        builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
    return totals


def sum_of_lanes(builder: Any, value: Any) -> Any:
    """By halves: in one order on every processor."""
    width = LANES // 2
    while width:
        lanes = ir.VectorType(_LANE, width)
        low, high = (
            builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(first, first + width))))
            for first in (0, width)
        )
        value = builder.fadd(low, high)
        width //= 2
    return builder.extract_element(value, _LANE(0))


def _sum_of_each(builder: Any, values: list[Any]) -> Any:
    """The sums of the lanes of sixteen vectors, as one vector in their order.

    At each step two vectors become one, of which either half of every group of lanes is from one of the two.
    """
    half = LANES // 2
    while half:
        low = sorted(
            (lane for lane in range(2 * LANES) if not lane & half), key=functools.partial(_place, half)
        )
        masks = [
            ir.Constant(ir.VectorType(_LANE, LANES), lanes) for lanes in (low, [lane + half for lane in low])
        ]
        pairs = zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True)
        values = [builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks)) for a, b in pairs]
        half //= 2
    return values[0]


def _place(half: int, lane: int) -> tuple[int, int, int]:
    """Where a lane of two vectors goes: by its group, then by its vector."""
    return lane % LANES // (2 * half), lane // LANES, lane % half


def _products(rows: int, others: int) -> Any:
    """The intrinsic that multiplies ``rows`` rows of x by ``others`` of w."""

    @intrinsic
    def add_products(  # numba's types of the arguments, of which those of numbers are not read
        _context: Any, x: Any, _r: Any, _x_start: Any, w: Any, _o: Any, _w_start: Any, _columns: Any, sums: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, r, x_start, w, o, w_start, columns, sums = arguments
            kinds = signature.args
            x_data, x_step = matrix(context, builder, kinds[0], x)
            w_data, w_step = matrix(context, builder, kinds[3], w)
            to, to_step = matrix(context, builder, kinds[7], sums)
            x_rows = [_row(builder, x_data, x_step, r, i, x_start) for i in range(rows)]
            w_rows = [_row(builder, w_data, w_step, o, k, w_start) for k in range(others)]
            # sixteen sums and what is multiplied take 24 registers: with 512 bits there are 32, else 16 of half the size
            at_once = others if has(context, "avx512f") or rows == 1 else 1
            # a multiplier waits four cycles for its own result: fewer than eight sums are made in parts
            parts = max(1, 2 * BLOCK // (rows * others))
            totals = [[zeros(builder, parts) for _ in range(others)] for _ in range(rows)]
            vectors = builder.sdiv(columns, _INDEX(LANES))
            for first in range(0, others, at_once):
                for width, vector in loops(builder, vectors, parts):
                    for part in range(width):
                        index = builder.mul(builder.add(vector, _INDEX(part)), _INDEX(LANES))
                        values = [_load(builder, row, index) for row in x_rows]
                        for k in range(first, first + at_once):
                            weights = _load(builder, w_rows[k], index)
                            for i, value in enumerate(values):
                                multiply_add(builder, totals[i][k][part], value, weights)
            found = [[_sum(builder, parts) for parts in of_row] for of_row in totals]
            for i, more in enumerate(_sums_of_rows(builder, found)):
                place = builder.bitcast(_row(builder, to, to_step, r, i, o), more.type.as_pointer())
                builder.store(builder.fadd(builder.load(place, align=4), more), place, align=4)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(x, i64, i64, w, i64, i64, i64, sums), generate

    return add_products


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


def loops(builder: Any, count: Any, most: int) -> Iterator[tuple[int, Any]]:
    """A loop over ``most`` at a time of ``count``, and one over the rest: how many at a time, and the first of them."""
    done = _INDEX(0)
    for width in sorted({most, 1}, reverse=True):
        times = builder.sdiv(builder.sub(count, done), _INDEX(width))
        with cgutils.for_range(builder, times) as loop:
            yield width, builder.add(done, builder.mul(loop.index, _INDEX(width)))
        done = builder.add(done, builder.mul(times, _INDEX(width)))


def _sum(builder: Any, parts: list[Any]) -> Any:
    return functools.reduce(builder.fadd, [builder.load(part) for part in parts])


def _row(builder: Any, data: Any, step: Any, first: Any, i: int, column: Any) -> Any:
    """Where row ``first + i`` has its ``column``."""
    at = builder.mul(builder.add(first, _INDEX(i)), step)
    return builder.gep(data, [builder.add(at, column)])


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
            y_data, y_step = matrix(context, builder, kinds[0], y)
            w_data, w_step = matrix(context, builder, kinds[4], w)
            to, to_step = matrix(context, builder, kinds[7], sums)
            w_data = builder.gep(w_data, [w_start])
            factors = [_row(builder, y_data, y_step, r, i, first) for i in range(rows)]
            targets = [_row(builder, to, to_step, row, i, start) for i in range(rows)]
            vectors = builder.sdiv(columns, _INDEX(LANES))
            # as many columns as leave registers for the sums
            most = BLOCK if has(context, "avx512f") or rows == 1 else 1
            for width, vector in loops(builder, vectors, most):
                offset = builder.mul(vector, _INDEX(LANES))
                _add_columns(builder, factors, count, w_data, w_step, offset, targets, width)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(y, i64, i64, i64, w, i64, i64, sums, i64, i64), generate

    return add_rows


def _add_columns(
    builder: Any, factors: list[Any], count: Any, w: Any, w_step: Any, offset: Any, targets: list[Any], width: int
) -> None:  # fmt: skip
    """``width`` vectors of columns of all the rows, from ``offset`` on."""
    totals = zeros(builder, len(factors) * width)
    with cgutils.for_range(builder, count) as loop:
        at = builder.add(builder.mul(loop.index, w_step), offset)
        weights = [_load(builder, w, builder.add(at, _INDEX(k * LANES))) for k in range(width)]
        for i, row in enumerate(factors):
            factor = splat(builder, builder.load(builder.gep(row, [loop.index])), _VECTOR)
            for k, value in enumerate(weights):
                multiply_add(builder, totals[i * width + k], factor, value)
    for i, row in enumerate(targets):
        for k in range(width):
            at = builder.gep(row, [builder.add(offset, _INDEX(k * LANES))])
            place = builder.bitcast(at, _VECTOR.as_pointer())
            more = builder.load(totals[i * width + k])
            builder.store(builder.fadd(builder.load(place, align=4), more), place, align=4)


add_products_of_one, add_products_of_four = _products(1, PAIR), _products(BLOCK, BLOCK)
"""``(x, r, x_start, w, o, w_start, columns, sums)``: add ``x[r:, x_start:] · w[o:, w_start:]ᵀ`` over so many columns, a multiple of
16, to ``sums[r:, o:]``: for one row of x and two of w, or for four and four. All arrays are fp32 ``[rows, columns]``, C-contiguous."""

add_rows_of_one, add_rows_of_four = _rows(1), _rows(BLOCK)
"""``(y, r, first, count, w, w_start, columns, sums, row, start)``: add ``y[r:, first : first + count] · w[:count, w_start:]`` for so
many columns, a multiple of 16, to ``sums[row:, start:]``, for one or four rows of y."""
