"""Products of many fp32 rows by AMX, which multiplies bf16 matrices; compiled for each decoder.

    x = x₀ + x₁ + x₂     xᵢ : the rest of x so far, rounded to bf16: a slice of x
    a b ≈ Σ aᵢ bⱼ        over i + j < slices: 6 products for three slices, 3 for two

    forward      Y = X Ŵᵀ    X is cut into panels of rows, and sliced; for each piece of the rows
                             of Ŵ, for each run of its columns: decode and slice;
                             sums += Ŵ[piece, run] · X[panel, run]ᵀ;  at last  Y[:, piece] = sumsᵀ
    transposed   X = Y Ŵ     Y is cut likewise; for each piece of the columns of Ŵ, for each part of
                             its rows: decode and slice;  sums += Y[panel, part] · Ŵ[part, piece];
                             at last  X[:, piece] = sums

Decoded values and their sums stay in the L2 cache. Three slices hold all of an fp32 number. Six
products take 0.4 times as long as one in fp32, and leave out 2⁻²⁷ of a b on average; fp32 rounds by
2⁻²⁵. Two slices and three products leave out 2⁻¹⁸: torch's precision "high" (Henry, Tang and
Heinecke 2019, arXiv 1904.06376). A magnitude from 3.39e38 on is infinite in bf16 and makes NaN.
Below 1e-33 the last slices are subnormal, and AMX takes them for 0.

A block of sums is 2 × 2 of AMX's registers. They are loaded from arrays of *lines* of STEP int16
numbers. Each slice of STEP terms has sixteen lines for each of two registers.

    of A        a line is one row's 32 terms
    of B        a line is two terms of each of sixteen columns, side by side
"""

# ruff: noqa: PLW0108 - numba counts the arguments of a lambda

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils

from modulora_kernels.compiled import jit
from modulora_kernels.cpu.memory import scratch, share, signed
from modulora_kernels.cpu.products import GAP, decode
from modulora_kernels.cpu.slices import (
    HALF,
    LINES,
    PART,
    STEP,
    put_panel,
    put_row,
    put_slices,
    put_steps,
    transpose,
    units,
)
from modulora_kernels.cpu.sums import WIDTH
from modulora_kernels.cpu.vectors import INDEX, LANES, call, has, load, operation, place

SIDE = 32
"""Rows and columns of a block of sums."""

MOST = 320
"""Rows or columns of Ŵ that a thread has decoded: 640 KiB of sums with 512 rows of X."""

RUN = 256
"""Columns of a row of Ŵ that are decoded at once: longer pieces are decoded faster."""

FEW_PANELS = 4
"""With at most so many panels of X, the cache has room for pieces of twice the length."""

CHUNK = 2048
"""Columns of X that are sliced at once."""

BETWEEN = GAP // 4  # numbers between two rows of sums
_SUMS, _A, _B = ((0, 1), (2, 3)), (4, 5), (6, 7)  # the eight registers
_ORDERS = {
    2: [(1, 0), (0, 0), (0, 1)],
    3: [(2, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 2)],
}
"""Pairs of slices to multiply, by the number of slices; neighbours share a slice."""

_BYTE, _LINE, _ROWS = ir.IntType(8), 64, 16  # of a register: bytes of a line, and lines
_VOID, _I64 = types.void, types.int64


@cache
def available() -> bool:
    """Whether kernels may use AMX: the processor has it, and the system permits it."""
    ask = getattr(torch.cpu, "_init_amx", None)
    features = ("amx-tile", "amx-bf16", "avx512bf16")
    return all(map(has, features)) and ask is not None and bool(ask())


def _amx(builder: Any, name: str, *operands: Any) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), list(operands))


@operation(lambda: _VOID())
def use_registers(_context: Any, builder: Any, _kinds: Any) -> None:
    """``()``: give all eight registers their full size, until :func:`leave_registers`."""
    # LDTILECFG: the palette; from byte 16 on the bytes of a line, 16 bits each; from 48 on lines
    layout = [1, *[0] * 15, *[_LINE, 0] * 8, *[0] * 16, *[_ROWS] * 8, *[0] * 8]
    constant = ir.Constant(ir.ArrayType(_BYTE, 64), layout)
    source = cgutils.global_constant(builder, "registers", constant)
    _amx(builder, "ldtilecfg", builder.bitcast(source, _BYTE.as_pointer()))


@operation(lambda: _VOID())
def leave_registers(_context: Any, builder: Any, _kinds: Any) -> None:
    """``()``: release the registers, which the system saves at each switch of threads."""
    _amx(builder, "tilerelease")


@operation(
    lambda _slices, a, _of_a, b, _of_b, _steps, c, _to: _VOID(_I64, a, _I64, b, _I64, _I64, c, _I64)
)
def add_square(
    context: Any, builder: Any, kinds: Any,
    slices: Any, a: Any, of_a: Any, b: Any, of_b: Any, steps: Any, c: Any, to: Any,
) -> None:  # fmt: skip
    """``(slices, a, of_a, b, of_b, steps, c, to)``: add one block of A B to ``c`` from ``to`` on.

    A is ``steps`` steps of ``a`` from line ``of_a``, B as many of ``b`` from ``of_b``; ``c`` is
    fp32.
    """
    a_data, b_data = (
        place(context, builder, kind, array, builder.mul(line, INDEX(STEP)), _BYTE)
        for kind, array, line in ((kinds[1], a, of_a), (kinds[3], b, of_b))
    )
    length = cgutils.unpack_tuple(
        builder, context.make_array(kinds[6])(context, builder, c).shape, 2
    )[1]
    across = builder.mul(length, INDEX(4))

    def for_all_sums(name: str) -> None:
        for i, registers in enumerate(_SUMS):
            for j, register in enumerate(registers):
                index = builder.add(builder.mul(length, INDEX(i * _ROWS)), INDEX(j * LANES))
                target = place(context, builder, kinds[6], c, builder.add(to, index), _BYTE)
                _amx(builder, name, _BYTE(register), target, across)

    for_all_sums("tileloadd64")
    for count, order in _ORDERS.items():
        with (
            builder.if_then(builder.icmp_signed("==", slices, INDEX(count))),
            cgutils.for_range(builder, steps) as step,
        ):
            begin = builder.mul(step.index, INDEX(count * LINES * _LINE))
            at_a, at_b = (builder.gep(data, [begin]) for data in (a_data, b_data))
            _add_step(builder, at_a, at_b, order)
    for_all_sums("tilestored64")


def _add_step(builder: Any, a: Any, b: Any, order: list[tuple[int, int]]) -> None:
    loaded: tuple[int | None, int | None] = (None, None)
    for pair in order:
        for wanted, there, data, registers in zip(pair, loaded, (a, b), (_A, _B), strict=True):
            for k, register in enumerate(registers if wanted != there else ()):
                source = builder.gep(data, [INDEX((wanted * LINES + k * _ROWS) * _LINE)])
                _amx(builder, "tileloadd64", _BYTE(register), source, INDEX(_LINE))
        loaded = pair
        for i, sums in enumerate(_SUMS):
            for j, total in enumerate(sums):
                _amx(builder, "tdpbf16ps", _BYTE(total), _BYTE(_A[i]), _BYTE(_B[j]))


@jit()
def pieces_of(count: int, unit: int, most: int, unit_bytes: int, budget: int, threads: int) -> Any:
    """The number of pieces into which a side of Ŵ is cut: each thread gets the same number.

    A piece is one unit, or as many as fit into ``most`` rows or columns and ``budget`` bytes.
    """
    together = max(1, min(most // unit, budget // unit_bytes))
    return min(units(count, unit), units(units(units(count, unit), together), threads) * threads)


@jit(borrows=True)
def add_columns(sums: Any, y: Any, start: int, count: int, room: Any) -> None:
    """``y[:, start + o] += sums[o]``, for ``count`` rows; ``room`` is scratch, ``[n, WIDTH]``."""
    for o in range(0, count, WIDTH):
        wide = min(WIDTH, count - o)
        transpose(sums, o, 0, wide, len(y), room, 0, 0)
        for r in range(len(y)):
            for k in range(wide):
                y[r, start + o + k] += room[r, k]


@jit(borrows=True)
def add_to_columns(sums: Any, x: Any, start: int, count: int) -> None:
    """``x[:, start + k] += sums[:, k]`` for ``count`` columns of sums."""
    for r in range(len(x)):
        for k in range(count):
            x[r, start + k] += sums[r, k]


def forward(weight: Any, threads: int, budget: int, slices: int, x: Any, y: Any) -> None:
    """Add ``x Ŵᵀ`` to ``y``, for fp32 ``[n, in]`` and ``[n, out]``.

    ``budget``: bytes of Ŵ that a thread may have decoded; ``slices``: 2 or 3.
    """
    (n, columns), out_features = x.shape, y.shape[1]
    panels = units(n, SIDE)
    lines, wide = slices * LINES, RUN if panels > FEW_PANELS else 2 * RUN
    pieces = pieces_of(out_features, SIDE, MOST, SIDE * wide * slices * 2, budget, threads)
    for start in range(0, columns, CHUNK):
        size = min(CHUNK, columns - start)
        along = units(size, STEP) * lines
        sliced = scratch(panels * along, STEP, np.int16)
        for index in prange(panels):
            panel = signed(index)
            put_panel(slices, x, panel * SIDE, start, size, sliced, panel * along)
        for index in prange(pieces):
            begin, stop = share(index, pieces, out_features, SIDE)
            blocks = units(stop - begin, SIDE)
            w = scratch(SIDE, wide + BETWEEN, np.float32)
            a = scratch(blocks * (wide // STEP) * lines, STEP, np.int16)
            sums = scratch(blocks * SIDE, panels * SIDE + BETWEEN, np.float32)
            sums[:] = 0
            use_registers()
            for run in range(0, size, wide):
                long = min(wide, size - run)
                of_run = units(long, STEP) * lines
                for block in range(blocks):
                    first = begin + block * SIDE
                    high = min(SIDE, stop - first)
                    decode(weight, first, start + run, long, w[:high])
                    w[high:] = 0
                    w[:, long : units(long, STEP) * STEP] = 0
                    for r in range(SIDE):
                        for step in range(units(long, STEP)):
                            at, to = r * w.shape[1] + step * STEP, block * of_run + step * lines + r
                            put_row(slices, w, at, a, to, LINES)
                for part in range(0, long, PART):
                    steps, at = units(min(PART, long - part), STEP), part // STEP * lines
                    for panel in range(panels):
                        of_x = panel * along + run // STEP * lines + at
                        for block in range(blocks):
                            to = block * SIDE * sums.shape[1] + panel * SIDE
                            add_square(
                                slices, a, block * of_run + at, sliced, of_x, steps, sums, to
                            )
            leave_registers()
            add_columns(sums, y, begin, stop - begin, scratch(n, LANES, np.float32))


def transposed(weight: Any, threads: int, budget: int, slices: int, y: Any, x: Any) -> None:
    """Add ``y Ŵ`` to ``x``, for fp32 ``[n, out]`` and ``[n, in]``; ``budget`` as above."""
    (n, rows), in_features = y.shape, x.shape[1]
    panels, lines = units(n, SIDE), slices * LINES
    most = MOST if panels > FEW_PANELS else 2 * MOST
    pieces = pieces_of(in_features, SIDE, most, SIDE * PART * (4 + slices * 2), budget, threads)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        along = units(size, STEP) * lines
        sliced = scratch(panels * along, STEP, np.int16)
        for index in prange(panels):
            line = signed(index) * along
            room = scratch(1, STEP, np.float32)
            for r in range(SIDE):
                row = signed(index) * SIDE + r
                put_steps(slices, y, row, start, size, sliced, line + r, lines, LINES, room)
        for index in prange(pieces):
            begin, stop = share(index, pieces, in_features, SIDE)
            columns = stop - begin
            blocks = units(columns, SIDE)
            w = scratch(PART, blocks * SIDE + BETWEEN, np.float32)
            b = scratch(blocks * (PART // STEP) * lines, STEP, np.int16)
            sums = scratch(panels * SIDE, blocks * SIDE + BETWEEN, np.float32)
            sums[:] = 0
            use_registers()
            for part in range(0, size, PART):
                deep = min(PART, size - part)
                steps = units(deep, STEP)
                decode(weight, start + part, begin, columns, w[:deep])
                w[deep : steps * STEP] = 0
                w[:deep, columns:] = 0
                for block in range(blocks):
                    for pair in range(steps * HALF):
                        step, of_step = pair // HALF, pair % HALF
                        for half in range(2):
                            at = 2 * pair * w.shape[1] + block * SIDE + half * HALF
                            line = (block * steps + step) * lines + half * HALF + of_step
                            two = load(w, at), load(w, at + w.shape[1])
                            put_slices(slices, two[0], two[1], True, b, line, LINES)
                for panel in range(panels):
                    of_y = panel * along + part // STEP * lines
                    for block in range(blocks):
                        of_w, to = (
                            block * steps * lines,
                            panel * SIDE * sums.shape[1] + block * SIDE,
                        )
                        add_square(slices, sliced, of_y, b, of_w, steps, sums, to)
            leave_registers()
            add_to_columns(sums, x, begin, columns)
