"""Products of many rows by AMX, which multiplies matrices of bf16. Compiled once for each decoder, like few rows.

    x = x₀ + x₁ + x₂              xᵢ : the rest of x so far, rounded to bf16: a slice of x
    a b ≈ Σ aᵢ bⱼ                 over i + j < slices: 6 products for three slices, 3 for two, 1 for one

    forward       Y = X Ŵᵀ        Xᵀ is sliced; for each piece of the rows of Ŵ, for each part of its columns:
                                  decode, slice;  sums += Ŵ[piece, part] · Xᵀ[part];  at last  Y[:, piece] = sumsᵀ
    transposed    X = Y Ŵ         Y is sliced; for each piece of the columns of Ŵ, for each part of its rows:
                                  decode, slice;  sums += Y[:, part] · Ŵ[part, piece];  at last  X[:, piece] = sums

Three slices are all of an fp32 number, and six products take 0.4 times as long as one in fp32; they leave out 2⁻²⁷ of a b on
average, where fp32 rounds by 2⁻²⁵. Two slices and three products, with 2⁻¹⁸, are torch's precision "high". After Henry,
Tang and Heinecke 2019 (arXiv 1904.06376). A magnitude from 3.39e38 on, which bf16 can't hold, makes NaN, as infinity
does. Below 1e-33 the last slices are subnormal, which AMX takes for 0.

A block of sums is 2 × 2 of AMX's registers. They are loaded from arrays of *lines*, of STEP int16 numbers each: for each
STEP terms, for each slice, sixteen lines for each of two registers.

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
from numba.extending import overload

from modulora_core.kernels.cpu.blocks import (
    BETWEEN,
    CHUNK,
    add_columns,
    add_to_columns,
    pieces_of,
    transpose,
    units,
)
from modulora_core.kernels.cpu.memory import scratch, share, signed
from modulora_core.kernels.cpu.products import decode
from modulora_core.kernels.cpu.vectors import (
    INDEX,
    LANES,
    Floats,
    Shorts,
    call,
    chosen,
    has,
    instruction,
    load,
    load_shorts,
    operation,
    place,
    store,
)
from modulora_core.kernels.loading import jit

SIDE = 32
"""Rows and columns of a block of sums."""

STEP = 32
"""Terms that are added at once: bf16 numbers of a line."""

LINES = 32
"""Lines of a slice in a step: of two registers."""

PART = 128
"""Terms that are added to a sum at once: 24 KiB of 32 rows in three slices stay in the L1 cache."""

MOST = 320
"""Rows or columns of Ŵ of which a thread has a part decoded: their sums with 512 rows of X are 640 KiB."""

RUN = 256
"""Columns of a row of Ŵ that are decoded at once: longer pieces are decoded faster."""

FEW_PANELS = 4
"""Blocks of rows of X whose sums leave room in the cache for pieces of twice the length."""

_SUMS, _A, _B = ((0, 1), (2, 3)), (4, 5), (6, 7)  # the eight registers
_ORDERS = {
    1: [(0, 0)],
    2: [(1, 0), (0, 0), (0, 1)],
    3: [(2, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 2)],
}
"""For each number of slices the slices of A and B to multiply: neighbours share one, which stays in its registers."""

_BYTE, _LINE, _ROWS = ir.IntType(8), 64, 16  # of a register: bytes of a line, and lines
_HALF = SIDE // 2
_VOID, _I64 = types.void, types.int64


@cache
def available() -> bool:
    """Whether kernels may use AMX: the processor has it, and the system lets this process, which torch asks for."""
    ask = getattr(torch.cpu, "_init_amx", None)
    features = ("amx-tile", "amx-bf16", "avx512bf16")
    return all(map(has, features)) and ask is not None and bool(ask())


def _amx(builder: Any, name: str, *operands: Any) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), list(operands))


@operation(lambda: _VOID())
def use_registers(_context: Any, builder: Any, _kinds: Any) -> None:
    """``()``: give all eight registers of a thread their full size, until :func:`leave_registers`."""
    # Intel's manual, LDTILECFG: the palette; from byte 16 on the bytes of a line, 16 bits each; from 48 on lines
    layout = [1, *[0] * 15, *[_LINE, 0] * 8, *[0] * 16, *[_ROWS] * 8, *[0] * 8]
    constant = ir.Constant(ir.ArrayType(_BYTE, 64), layout)
    source = cgutils.global_constant(builder, "registers", constant)
    _amx(builder, "ldtilecfg", builder.bitcast(source, _BYTE.as_pointer()))


@operation(lambda: _VOID())
def leave_registers(_context: Any, builder: Any, _kinds: Any) -> None:
    """``()``: the system saves 8 KiB more of a thread as long as its registers are in use."""
    _amx(builder, "tilerelease")


@operation(
    lambda _slices, a, _of_a, b, _of_b, _steps, c, _to: _VOID(_I64, a, _I64, b, _I64, _I64, c, _I64)
)
def add_square(
    context: Any, builder: Any, kinds: Any, slices: Any, a: Any, of_a: Any, b: Any, of_b: Any, steps: Any, c: Any, to: Any
) -> None:  # fmt: skip
    """``(slices, a, of_a, b, of_b, steps, c, to)``: add one block of A B to ``c[to]`` on, between use and leave.

    A and B are so many steps of ``a`` and ``b`` from lines ``of_a`` and ``of_b`` on; ``c`` is fp32, C-contiguous.
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
    """``(shorts)``: the numbers of the first half and of the second, in turn."""
    return chosen(builder, shorts, [k // 2 + k % 2 * LANES for k in range(STEP)])


@jit()
def _put_slices(slices: int, a: Any, b: Any, paired: bool, out: Any, line: int, apart: int) -> None:
    """Slice k of 32 numbers to line ``line + k * apart``; ``paired``: a number of ``a`` beside one of ``b``."""
    for k in range(slices):
        both = _to_bf16(a, b)
        store(out, (line + k * apart) * STEP, _in_turn(both) if paired else both)
        a, b = a - _first(both), b - _second(both)  # exact: the rest has fewer digits


def _put_row(slices: int, x: Any, at: int, out: Any, line: int, apart: int) -> None:
    """A line of A, of 32 numbers from ``x[at]`` on, for each slice; of bf16 there is one."""
    raise NotImplementedError


@overload(_put_row, strict=False)
def _of_dtype(slices: Any, x: Any, at: Any, out: Any, line: Any, apart: Any) -> Any:  # noqa: ARG001
    def of_bf16(slices: int, x: Any, at: int, out: Any, line: int, apart: int) -> None:  # noqa: ARG001
        store(out, line * STEP, load_shorts(x, at))

    def of_fp32(slices: int, x: Any, at: int, out: Any, line: int, apart: int) -> None:
        _put_slices(slices, load(x, at), load(x, at + LANES), False, out, line, apart)

    return of_fp32 if x.dtype is types.float32 else of_bf16


@jit()
def _put_steps(
    slices: int, x: Any, row: int, start: int, size: int, out: Any, line: int, leap: int, apart: int, room: Any
) -> None:  # fmt: skip
    """Lines of A of ``x[row, start : start + size]``, ``leap`` from step to step, and zeros for what is not there.

    ``room`` is scratch, ``[1, STEP]`` of x's dtype.
    """
    whole = size // STEP if row < len(x) else 0
    for step in range(whole):
        at = row * x.shape[1] + start + step * STEP
        _put_row(slices, x, at, out, line + step * leap, apart)
    for step in range(whole, units(size, STEP)):
        room[:] = 0
        if row < len(x):
            room[0, : size - step * STEP] = x[row, start + step * STEP : start + size]
        _put_row(slices, room, 0, out, line + step * leap, apart)


@jit()
def _put_panel(slices: int, x: Any, first: int, start: int, size: int, out: Any, line: int) -> None:
    """Lines of B, whose columns are :data:`SIDE` rows of X and whose terms are ``size`` columns from ``start`` on."""
    room = scratch(1, STEP, x.dtype)
    pairs = scratch(PART // STEP * slices * _HALF, STEP // 2, np.float32)  # two bf16 numbers each
    of_rows, of_columns = pairs.view(np.int16), out.view(np.float32)
    for part in range(0, size, PART):
        wide = min(PART, size - part)
        for half in range(2):
            for r in range(_HALF):
                row, leap = first + half * _HALF + r, slices * _HALF
                _put_steps(slices, x, row, start + part, wide, of_rows, r, leap, _HALF, room)
            for index in range(units(wide, STEP) * slices):
                to = line + (part // STEP * slices + index) * LINES + half * _HALF
                transpose(pairs, index * _HALF, 0, _HALF, _HALF, of_columns, to, 0)


def forward(weight: Any, threads: int, budget: int, slices: int, x: Any, y: Any) -> None:
    """Add ``x Ŵᵀ`` to ``y``, for ``x`` fp32 or bf16 ``[n, in]`` and ``y`` fp32 ``[n, out]``.

    ``budget``: bytes of Ŵ that a thread may have decoded; ``slices``: 1, 2 or 3, of bf16 1.
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
            _put_panel(slices, x, panel * SIDE, start, size, sliced, panel * along)
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
                            _put_row(slices, w, at, a, to, LINES)
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
    """Add ``y Ŵ`` to ``x``, for ``y`` fp32 or bf16 ``[n, out]`` and ``x`` fp32 ``[n, in]``; else as above."""
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
            room = scratch(1, STEP, y.dtype)
            for r in range(SIDE):
                row = signed(index) * SIDE + r
                _put_steps(slices, y, row, start, size, sliced, line + r, lines, LINES, room)
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
                    for pair in range(steps * _HALF):
                        step, of_step = pair // _HALF, pair % _HALF
                        for half in range(2):
                            at = 2 * pair * w.shape[1] + block * SIDE + half * _HALF
                            line = (block * steps + step) * lines + half * _HALF + of_step
                            two = load(w, at), load(w, at + w.shape[1])
                            _put_slices(slices, two[0], two[1], True, b, line, LINES)
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
