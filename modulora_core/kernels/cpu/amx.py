"""Blocks of sums by AMX, in kernels that numba compiles: products of bf16 numbers, and of fp32 numbers as sums of bf16 ones.

    x = x₀ + x₁ + x₂              xᵢ : what is left of x so far, rounded to bf16; a slice of x
    a b ≈ Σ aᵢ bⱼ                 over i + j < slices: 6 products for three slices, 3 for two, 1 for one

Three slices are all of x. AMX multiplies matrices of 16 × 32 and 32 × 16 bf16 numbers, exactly, and adds in fp32: in 16 cycles as much as
AVX-512 does in 256 in fp32. So six products take 0.4 times as long as one in fp32; they leave out 2⁻²⁷ of a b on average, where fp32's
rounding is 2⁻²⁵. Three, with 2⁻¹⁸, are what torch calls the precision "high". The way is that of Henry, Tang and Heinecke 2019 (arXiv
1904.06376).

A magnitude that rounds to more than bf16 has, from 3.39e38 on, makes NaN, as does an infinity. Below 1e-33 the last slices are subnormal,
which AMX takes for 0.

A block of sums is 2 × 2 of the processor's registers for matrices. What they are loaded from are arrays of :data:`STEP` int16 a line, one
step after the other, and in each of them :data:`LINES` lines of each slice, sixteen for each of two registers:

    of A        a line is one row's 32 terms
    of B        a line is two terms of each of sixteen columns, side by side
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from modulora_core.kernels.cpu.prefetch import FAR, ask_for
from modulora_core.kernels.cpu.vectors import LANES, assembly, call, has, matrix, pointer

SIDE = 32
"""Rows and columns of a block of sums."""

STEP = 32
"""Terms of a sum that are added at once: as many bf16 numbers as a line has."""

LINES = 32
"""Lines of a slice in a step: of two registers."""

_SUMS, _A, _B = ((0, 1), (2, 3)), (4, 5), (6, 7)  # the eight registers
_ORDERS = {
    1: [(0, 0)],
    2: [(1, 0), (0, 0), (0, 1)],
    3: [(2, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 2)],
}
"""For each number of slices, which of A and B are multiplied: each pair has one of the pair before, which is in its registers already."""

_FLOAT, _BYTE, _LANE, _INDEX = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _WHOLES = ir.VectorType(_FLOAT, LANES), ir.VectorType(_LANE, LANES)
_LINE_OF = ir.VectorType(ir.IntType(16), STEP)
_LINE, _ROWS = 64, 16  # of a register: bytes of a line, and lines


@cache
def available() -> bool:
    """Whether kernels may use AMX: the processor has it, and the system lets this process, which has to ask once (Linux's
    ``ARCH_REQ_XCOMP_PERM``).
    """
    context = cpu_target.target_context
    is_there = all(has(context, feature) for feature in ("amx-tile", "amx-bf16", "avx512bf16"))
    ask = getattr(
        torch.cpu, "_init_amx", None
    )  # torch asks the system, as it does for its own products
    return is_there and ask is not None and bool(ask())


@intrinsic
def use_registers(_context: Any) -> Any:
    """``()``: have a thread's eight registers be as large as they get, until :func:`leave_registers`."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        # Intel's manual, LDTILECFG: the palette; from byte 16 on the bytes of a line, 16 bits each; from byte 48 on how many lines
        layout = [1, *[0] * 15, *[_LINE, 0] * 8, *[0] * 16, *[_ROWS] * 8, *[0] * 8]
        constant = ir.Constant(ir.ArrayType(_BYTE, 64), layout)
        place = cgutils.global_constant(builder, "registers", constant)
        _call(builder, "ldtilecfg", builder.bitcast(place, _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def leave_registers(_context: Any) -> Any:
    """``()``: use them no more. As long as they are in use, the system keeps 8 KiB more of the thread whenever it runs another."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def add_square(  # numba's types of the arguments, of which those of numbers are not read
    _context: Any, _slices: Any, a: Any, _line_of_a: Any, b: Any, _line_of_b: Any, _steps: Any, c: Any, _row: Any, _column: Any,
    soon: Any, _at: Any, _count: Any,
) -> Any:  # fmt: skip
    """``c[row :, column :] += A B``, of one block of sums, between :func:`use_registers` and :func:`leave_registers`.

    A and B are so many steps of ``a`` and ``b`` from their lines on; ``c`` is fp32 and C-contiguous. Terms are added from the first to
    the last. Meanwhile ``count`` lines of ``soon`` for each step are fetched to the L2 cache, from line ``at`` on, which may be anywhere.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slices, a, line_of_a, b, line_of_b, steps, c, row, column, soon, at, ahead = arguments
        kinds = signature.args
        a_data, b_data, asked = (
            pointer(context, builder, kind, array, builder.mul(line, _INDEX(STEP)), _BYTE)
            for kind, array, line in (
                (kinds[1], a, line_of_a),
                (kinds[3], b, line_of_b),
                (kinds[9], soon, at),
            )
        )
        data, length = matrix(context, builder, kinds[6], c)
        corner = builder.gep(data, [builder.add(builder.mul(row, length), column)])
        across = builder.mul(length, _INDEX(4))

        def for_all_sums(instruction: str) -> None:
            for i, registers in enumerate(_SUMS):
                for j, register in enumerate(registers):
                    index = builder.add(builder.mul(length, _INDEX(i * _ROWS)), _INDEX(j * LANES))
                    place = builder.bitcast(builder.gep(corner, [index]), _BYTE.as_pointer())
                    _call(builder, instruction, _BYTE(register), place, across)

        for_all_sums("tileloadd64")
        for count in _ORDERS:
            with (
                builder.if_then(builder.icmp_signed("==", slices, _INDEX(count))),
                cgutils.for_range(builder, steps) as step,
            ):
                with cgutils.for_range(builder, ahead) as line:
                    index = builder.add(builder.mul(step.index, ahead), line.index)
                    ask_for(builder, builder.gep(asked, [builder.mul(index, _INDEX(_LINE))]), FAR)
                begin = builder.mul(step.index, _INDEX(count * LINES * _LINE))
                _add_step(
                    builder,
                    builder.gep(a_data, [begin]),
                    builder.gep(b_data, [begin]),
                    _ORDERS[count],
                )
        for_all_sums("tilestored64")
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, a, i64, b, i64, i64, c, i64, i64, soon, i64, i64), generate


def _add_step(builder: Any, a: Any, b: Any, order: list[tuple[int, int]]) -> None:
    loaded: tuple[int | None, int | None] = (None, None)
    for pair in order:
        for wanted, there, data, registers in zip(pair, loaded, (a, b), (_A, _B), strict=True):
            for k, register in enumerate(registers if wanted != there else ()):
                place = builder.gep(data, [_INDEX((wanted * LINES + k * _ROWS) * _LINE)])
                _call(builder, "tileloadd64", _BYTE(register), place, _INDEX(_LINE))
        loaded = pair
        for i, sums in enumerate(_SUMS):
            for j, total in enumerate(sums):
                _call(builder, "tdpbf16ps", _BYTE(total), _BYTE(_A[i]), _BYTE(_B[j]))


def _call(builder: Any, instruction: str, *operands: Any) -> None:
    call(builder, f"llvm.x86.{instruction}", ir.VoidType(), list(operands))


@intrinsic
def put_row(
    _context: Any, _count: Any, x: Any, _row: Any, _column: Any, out: Any, _line: Any, _apart: Any
) -> Any:
    """A line of A: of ``x[row, column : column + 32]``, C-contiguous, slice k to line ``line + k apart`` of ``out``.

    Of bf16, which is given as the int16 of its bits, there is one.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slices, x, row, column, out, line, apart = arguments
        data, length = matrix(context, builder, signature.args[1], x)
        index = builder.add(builder.mul(row, length), column)
        if signature.args[1].dtype is types.int16:
            place = builder.bitcast(builder.gep(data, [index]), _LINE_OF.as_pointer())
            lines = [builder.load(place, align=2)]
        else:
            places = (builder.add(index, _INDEX(first)) for first in (0, LANES))
            lines = list(_slices(builder, *(_numbers(builder, data, place) for place in places)))
        _put(context, builder, slices, (signature.args[4], out, line, apart), lines)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, x, i64, i64, out, i64, i64), generate


@intrinsic
def put_pair(
    _context: Any, _count: Any, x: Any, _row: Any, _column: Any, out: Any, _line: Any, _apart: Any
) -> Any:
    """A line of B: of ``x[row, column : column + 16]`` beside those of the next row; else as :func:`put_row`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slices, x, row, column, out, line, apart = arguments
        data, length = matrix(context, builder, signature.args[1], x)
        index = builder.add(builder.mul(row, length), column)
        numbers = [_numbers(builder, data, place) for place in (index, builder.add(index, length))]
        by_turns = [k // 2 + k % 2 * LANES for k in range(STEP)]
        mask = ir.Constant(ir.VectorType(_LANE, STEP), by_turns)
        pairs = [builder.shuffle_vector(each, each, mask) for each in _slices(builder, *numbers)]
        _put(context, builder, slices, (signature.args[4], out, line, apart), pairs)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, x, i64, i64, out, i64, i64), generate


def _numbers(builder: Any, data: Any, index: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [index]), _FLOATS.as_pointer()), align=4)


def _slices(builder: Any, first: Any, second: Any) -> Iterator[Any]:
    """Those of two vectors of sixteen numbers, side by side."""
    rest = [first, second]
    for k in range(len(_ORDERS)):
        rounded = assembly(builder, "vcvtne2ps2bf16 $2, $1, $0", _LINE_OF, rest[::-1], "=v,v,v")
        yield rounded
        if k + 1 < len(_ORDERS):  # exact: the rest has fewer digits than the number
            rest = [
                builder.fsub(numbers, _widened(builder, rounded, i * LANES))
                for i, numbers in enumerate(rest)
            ]


def _widened(builder: Any, rounded: Any, start: int) -> Any:
    """Sixteen of them in fp32."""
    mask = ir.Constant(_WHOLES, list(range(start, start + LANES)))
    wide = builder.zext(builder.shuffle_vector(rounded, rounded, mask), _WHOLES)
    return builder.bitcast(builder.shl(wide, ir.Constant(_WHOLES, [16] * LANES)), _FLOATS)


def _put(
    context: Any, builder: Any, slices: Any, place: tuple[Any, Any, Any, Any], lines: list[Any]
) -> None:
    """As many of the lines as there are slices."""
    kind, out, line, apart = place
    for k, value in enumerate(lines):
        with builder.if_then(builder.icmp_signed(">", slices, _INDEX(k))):
            index = builder.mul(builder.add(line, builder.mul(apart, _INDEX(k))), _INDEX(STEP))
            builder.store(value, pointer(context, builder, kind, out, index, _LINE_OF), align=2)
