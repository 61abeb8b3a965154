"""Slices of numbers in bf16, in the lines that AMX loads (:mod:`modulora_kernels.cpu.amx`)."""

# ruff: noqa: PLW0108 - numba counts the arguments of a lambda

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types

from modulora_kernels.compiled import jit
from modulora_kernels.cpu.memory import scratch
from modulora_kernels.cpu.sums import WIDTH, store_transposed
from modulora_kernels.cpu.vectors import (
    LANES,
    Floats,
    Shorts,
    chosen,
    instruction,
    load,
    operation,
    store,
)

STEP = 32
"""Terms that are added at once: bf16 numbers of a line."""

LINES = 32
"""Lines of a slice in a step: of two registers."""

PART = 128
"""Terms that are added to a sum at once: 24 KiB of 32 rows in three slices stay in the L1 cache."""

HALF = 16
"""Lines of a register."""


@operation(lambda a, b: Shorts(a, b))
def _to_bf16(_context: Any, builder: Any, _kinds: Any, a: Any, b: Any) -> Any:
    """``(a, b)``: 32 fp32 numbers, rounded."""
    of = ir.VectorType(ir.IntType(16), 2 * LANES)
    return instruction(builder, "vcvtne2ps2bf16 $2, $1, $0", of, [b, a], "=v,v,v")


def _part_of(first: int) -> Any:
    @operation(lambda shorts: Floats(shorts))
    def part(_context: Any, builder: Any, _kinds: Any, shorts: Any) -> Any:
        of = ir.VectorType(ir.IntType(32), LANES)
        wide = builder.zext(chosen(builder, shorts, range(first, first + LANES)), of)
        bits = builder.shl(wide, ir.Constant(of, [16] * LANES))
        return builder.bitcast(bits, ir.VectorType(ir.FloatType(), LANES))

    return part


_first, _second = _part_of(0), _part_of(LANES)


@operation(lambda shorts: Shorts(shorts))
def _in_turn(_context: Any, builder: Any, _kinds: Any, shorts: Any) -> Any:
    """``(shorts)``: interleave the numbers of the first half and of the second."""
    return chosen(builder, shorts, [k // 2 + k % 2 * LANES for k in range(STEP)])


@jit()
def units(count: int, unit: int) -> int:
    """The number of units that hold ``count`` numbers: the quotient, rounded up."""
    return (count + unit - 1) // unit


@jit(borrows=True)
def transpose(
    a: Any, row: int, column: int, rows: int, columns: int, b: Any, to_row: int, to_column: int
) -> None:
    """``b[to_row + k, to_column + r] = a[row + r, column + k]``, for fp32."""
    long, step = a.shape[1], b.shape[1]
    high, wide = rows // WIDTH * WIDTH, columns // WIDTH * WIDTH
    for k in range(0, wide, WIDTH):
        for r in range(0, high, WIDTH):
            at, to = (row + r) * long + column + k, (to_row + k) * step + to_column + r
            store_transposed(a, at, long, b, to, step)
    for k in range(columns):
        for r in range(high if k < wide else 0, rows):
            b[to_row + k, to_column + r] = a[row + r, column + k]


@jit()
def put_slices(slices: int, a: Any, b: Any, paired: bool, out: Any, line: int, apart: int) -> None:
    """Write slice k of 32 numbers to line ``line + k * apart``; ``paired`` interleaves a and b."""
    for k in range(slices):
        both = _to_bf16(a, b)
        store(out, (line + k * apart) * STEP, _in_turn(both) if paired else both)
        a, b = a - _first(both), b - _second(both)  # exact: the rest has fewer digits


@jit()
def put_row(slices: int, x: Any, at: int, out: Any, line: int, apart: int) -> None:
    """Write one line of A for each slice: 32 numbers from ``x[at]`` on."""
    put_slices(slices, load(x, at), load(x, at + LANES), False, out, line, apart)


@jit()
def put_steps(
    slices: int, x: Any, row: int, start: int, size: int,
    out: Any, line: int, leap: int, apart: int, room: Any,
) -> None:  # fmt: skip
    """Write lines of A, ``leap`` apart: ``x[row, start : start + size]``, padded with zeros.

    ``room`` is scratch, fp32 ``[1, STEP]``.
    """
    whole = size // STEP if row < len(x) else 0
    for step in range(whole):
        at = row * x.shape[1] + start + step * STEP
        put_row(slices, x, at, out, line + step * leap, apart)
    for step in range(whole, units(size, STEP)):
        room[:] = 0
        if row < len(x):
            room[0, : size - step * STEP] = x[row, start + step * STEP : start + size]
        put_row(slices, room, 0, out, line + step * leap, apart)


@jit()
def put_panel(slices: int, x: Any, first: int, start: int, size: int, out: Any, line: int) -> None:
    """Write lines of B, whose columns are 32 rows of X."""
    room = scratch(1, STEP, np.float32)
    pairs = scratch(PART // STEP * slices * HALF, STEP // 2, np.float32)  # two bf16 numbers each
    of_rows, of_columns = pairs.view(np.int16), out.view(np.float32)
    for part in range(0, size, PART):
        wide = min(PART, size - part)
        for half in range(2):
            for r in range(HALF):
                row, leap = first + half * HALF + r, slices * HALF
                put_steps(slices, x, row, start + part, wide, of_rows, r, leap, HALF, room)
            for index in range(units(wide, STEP) * slices):
                to = line + (part // STEP * slices + index) * LINES + half * HALF
                transpose(pairs, index * HALF, 0, HALF, HALF, of_columns, to, 0)
