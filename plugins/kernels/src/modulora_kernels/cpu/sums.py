"""Blocks of sums in registers, as values of numba functions: the inner loops of products.

A block is a tuple of rows, and a row a tuple of registers. A register has :data:`WIDTH` fp32
numbers, or as many pairs of bf16.
"""

# ruff: noqa: PLW0108 - numba counts the arguments of a lambda

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils

from modulora_kernels.cpu.vectors import (
    FLOAT,
    INDEX,
    INT,
    Vector,
    chosen,
    constant,
    has,
    llvm,
    multiplied,
    operation,
    place,
    same,
)

WIDTH = 16 if has("avx512f") else 8 if has("avx2") else 4
"""fp32 numbers of a register."""

Register, Pairs = Vector(types.float32, WIDTH), Vector(types.int16, 2 * WIDTH)

_REGISTER, _I64 = ir.VectorType(FLOAT, WIDTH), types.int64


def zeros(rows: int, columns: int) -> Any:
    """The operation ``()`` that gives a block of zeros."""
    kind = types.UniTuple(types.UniTuple(Register, columns), rows)

    @operation(lambda: kind())
    def made(context, builder, _kinds):
        return _block(context, builder, kind, [[constant(_REGISTER, 0.0)] * columns] * rows)

    return made


def _block(context: Any, builder: Any, kind: Any, rows: list[list[Any]]) -> Any:
    packed = [context.make_tuple(builder, kind.dtype, row) for row in rows]
    return context.make_tuple(builder, kind, packed)


def _rows(builder, block):
    return [cgutils.unpack_tuple(builder, row) for row in cgutils.unpack_tuple(builder, block)]


def registers(count: int) -> Any:
    """The operation ``(array, at, apart)`` that loads registers, ``apart`` from each other.

    A register has fp32 numbers, or pairs of neighbouring numbers of bf16.
    """

    @operation(lambda array, _at, _apart: _registers_of(array, count)(array, _I64, _I64))
    def loaded(context, builder, kinds, array, at, apart):
        kind, values = _registers_of(kinds[0], count), []
        for _ in range(count):
            source = place(context, builder, kinds[0], array, at, llvm(kind.dtype))
            values.append(builder.load(source, align=2))
            at = builder.add(at, apart)
        return context.make_tuple(builder, kind, values)

    return loaded


def _registers_of(array, count):
    return types.UniTuple(Register if array.dtype is types.float32 else Pairs, count)


def columns_of_two_rows(count: int) -> Any:
    """The operation ``(array, at, apart)`` that loads ``count`` registers of a row of numbers.

    Of bf16 it loads pairs from two rows, ``apart`` from each other: a pair is a column's two
    numbers. As the processor interleaves within 128 bits, the first half of the registers has low
    columns; :func:`add_block` orders them.
    """

    @operation(lambda array, _at, _apart: _registers_of(array, count)(array, _I64, _I64))
    def loaded(context, builder, kinds, array, at, apart):
        kind, values = _registers_of(kinds[0], count), []
        for k in range(count):
            here = builder.add(at, INDEX(k * WIDTH))
            if kind.dtype == Register:
                values.append(
                    builder.load(place(context, builder, kinds[0], array, here, _REGISTER), align=4)
                )
                continue
            if k % 2:
                continue
            two = [
                builder.load(place(context, builder, kinds[0], array, row, llvm(Pairs)), align=2)
                for row in (here, builder.add(here, apart))
            ]
            values += [chosen(builder, two[0], lanes, two[1]) for lanes in (_LOW, _HIGH)]
        return context.make_tuple(builder, kind, values)

    return loaded


_LOW = [
    row * 2 * WIDTH + at + k for at in range(0, 2 * WIDTH, 8) for k in range(4) for row in (0, 1)
]
_HIGH = [lane + 4 for lane in _LOW]
_COLUMNS = [(k // 4 % 2) * WIDTH + k // 8 * 4 + k % 4 for k in range(2 * WIDTH)]


@operation(lambda a, b, block: block(a, b, block))
def add_products(context, builder, kinds, a, b, block):
    """``(a, b, block)``: the block with ``a[i] * b[j]`` added at row i, column j, lane by lane."""
    a, b = (cgutils.unpack_tuple(builder, v) for v in (a, b))
    sums = [
        [multiplied(builder, x, w, total) for w, total in zip(b, row, strict=True)]
        for x, row in zip(a, _rows(builder, block), strict=True)
    ]
    return _block(context, builder, kinds[2], sums)


@operation(lambda a, _at, _apart, b, block: block(a, _I64, _I64, b, block))
def add_multiples(context, builder, kinds, a, at, apart, b, block):
    """``(a, at, apart, b, block)``: add ``a[at + i * apart] * b[j]`` at row i, column j.

    In bf16, ``a[...]`` and the number after it form a pair.
    """
    number = FLOAT if kinds[0].dtype is types.float32 else INT
    b, sums = cgutils.unpack_tuple(builder, b), []
    for row in _rows(builder, block):
        source = place(context, builder, kinds[0], a, at, number)
        factor = same(builder, builder.load(source, align=2), ir.VectorType(number, WIDTH))
        sums.append(
            [multiplied(builder, factor, w, total) for w, total in zip(b, row, strict=True)]
        )
        at = builder.add(at, apart)
    return _block(context, builder, kinds[4], sums)


@operation(lambda a, sums, _at, _apart, block: types.void(a, sums, _I64, _I64, block))
def add_block(context, builder, kinds, _a, sums, at, apart, block):
    """``(a, sums, at, apart, block)``: add a block's rows to ``sums[at + i * apart]`` on."""
    for row in _rows(builder, block):
        if kinds[0].dtype is not types.float32:
            two = [
                chosen(builder, low, _COLUMNS, high)
                for low, high in zip(row[::2], row[1::2], strict=True)
            ]
            row = [chosen(builder, v, range(k, k + WIDTH)) for v in two for k in (0, WIDTH)]
        for j, more in enumerate(row):
            _add(context, builder, kinds[1], sums, builder.add(at, INDEX(j * WIDTH)), more)
        at = builder.add(at, apart)


@operation(lambda block, sums, _at: types.void(block, sums, _I64))
def add_sums_of_lanes(context, builder, kinds, block, sums, at):
    """``(block, sums, at)``: add the sum of each register to ``sums[at]`` on, row after row."""
    values = [value for row in _rows(builder, block) for value in row]
    _add(
        context,
        builder,
        kinds[1],
        sums,
        at,
        _sums_of(builder, values),
    )


def _add(context, builder, kind, sums, at, more):
    target = place(context, builder, kind, sums, at, _REGISTER)
    builder.store(builder.fadd(builder.load(target, align=4), more), target, align=4)


def _halves(half: int) -> tuple[list[int], list[int]]:
    """Swap every second block of ``half`` lanes between two registers."""
    low = [WIDTH + lane - half if lane & half else lane for lane in range(WIDTH)]
    return low, [WIDTH + lane if lane & half else lane + half for lane in range(WIDTH)]


def _sums_of(builder: Any, values: list[Any]) -> Any:
    """The sum of each of :data:`WIDTH` registers: a transposition, added up at each step."""
    half = WIDTH // 2
    while half:
        pairs = zip(values[:half], values[half:], strict=True)
        values = [
            builder.fadd(*(chosen(builder, a, lanes, b) for lanes in _halves(half)))
            for a, b in pairs
        ]
        half //= 2
    return values[0]


@operation(lambda array: _I64(array))
def pair(_context, _builder, kinds, _array):
    """``(array)``: the constant number of values that one lane multiplies: 2 for bf16, else 1."""
    return INDEX(1 if kinds[0].dtype is types.float32 else 2)
