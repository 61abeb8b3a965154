"""The product of one row with NF4's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_k level[code[o, k]] absmax[block of (o, k)] x[k]

Sixteen bytes hold 32 codes, the even columns' in their high halves and the odd columns' in the low ones. Levels are looked up and
multiplied in registers, by an x whose columns were put in the order of the levels first, and the sum of 32 products is scaled: nothing
decoded is stored. AVX-512 looks sixteen levels up at once. AVX2 does so with bytes, so it looks up each of a level's four bytes, and puts
them together, for 32 codes in fifteen operations. A weight of out · in values takes out · in / 2 bytes and 4 bytes a block, read once, and
seven operations for each 32 values, 21 in code for AVX2. The floor is the larger of bytes / bandwidth and operations / peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.prefetch import AHEAD, NEAR, ask_for
from modulora_core.kernels.cpu.shares import share
from modulora_core.kernels.cpu.vectors import (
    LANES,
    call,
    chosen,
    has,
    loops,
    pointer,
    splat,
    sum_of_lanes,
    zeros,
)
from modulora_nf4.cpu_decode import levels, put_absmax
from modulora_nf4.reference import LEVELS

_STEP = 2 * LANES  # columns that are multiplied at once
_ROWS = 16  # whose constants are computed at once, where they are quantized too
_SUMS = 4  # a multiplier waits for its own result: so many sums are made side by side

_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()
_BYTES, _WHOLES, _FLOATS = (
    ir.VectorType(of, LANES) for of in (ir.IntType(8), ir.IntType(32), _FLOAT)
)
_ALL_BYTES, _ALL_SHORTS, _ALL_WORDS = (
    ir.VectorType(ir.IntType(bits), 256 // bits) for bits in (8, 16, 64)
)

_BYTES_OF_LEVELS = np.array(LEVELS, "<f4").view(np.uint8).reshape(LANES, 4).T.tolist()
"""The first byte of each level, the second, and so on."""


def _levels_of(context: Any, builder: Any, found: Any) -> list[Any]:
    """Of sixteen bytes the levels of their 32 codes, in two vectors, in the order of :func:`_apart`."""
    if _by_bytes(context):
        return _levels_by_bytes(builder, found)
    odd = builder.zext(found, _WHOLES)  # levels() looks at the low half alone
    even = builder.lshr(odd, ir.Constant(_WHOLES, [4] * LANES))
    return [levels(context, builder, even), levels(context, builder, odd)]


def _by_bytes(context: Any) -> bool:
    return has(context, "avx2") and not has(context, "avx512f")


def _levels_by_bytes(builder: Any, found: Any) -> list[Any]:
    """By AVX2's lookup of bytes, which is of sixteen: each of a level's four bytes is looked up, and they are put together, in each half
    of a register for itself. Low halves of bytes are in the first, high ones in the second.
    """
    both = builder.bitcast(chosen(builder, found, [*range(LANES), *range(LANES)]), _ALL_WORDS)
    halves = builder.bitcast(builder.lshr(both, ir.Constant(_ALL_WORDS, [0, 0, 4, 4])), _ALL_BYTES)
    index = builder.and_(halves, ir.Constant(_ALL_BYTES, [15] * _ALL_BYTES.count))
    parts = [
        call(
            builder,
            "llvm.x86.avx2.pshuf.b",
            _ALL_BYTES,
            [ir.Constant(_ALL_BYTES, 2 * table), index],
        )
        for table in _BYTES_OF_LEVELS
    ]
    lower, upper = (_side_by_side(builder, parts[at : at + 2], _ALL_SHORTS) for at in (0, 2))
    eights = ir.VectorType(_FLOAT, LANES // 2)
    pairs = [_side_by_side(builder, halves, eights) for halves in zip(lower, upper, strict=True)]
    in_turn = ir.Constant(_WHOLES, list(range(LANES)))
    return [builder.shuffle_vector(*pair, in_turn) for pair in pairs]


def _side_by_side(builder: Any, pair: Sequence[Any], of: ir.VectorType) -> list[Any]:
    """The low and the high numbers of each half of two registers, in turn, as vectors of numbers twice as wide."""
    count = pair[0].type.count
    half, quarter = count // 2, count // 4
    found = []
    for start in (0, quarter):
        lanes = [
            begin + k + vector
            for begin in (start, start + half)
            for k in range(quarter)
            for vector in (0, count)
        ]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), count), lanes)
        found.append(builder.bitcast(builder.shuffle_vector(*pair, mask), of))
    return found


@intrinsic
def _is_by_bytes(_context: Any) -> Any:
    def generate(context: Any, _builder: Any, _signature: Any, _arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(_by_bytes(context)))

    return types.boolean(), generate


@intrinsic
def _row_product(
    _context: Any,
    codes: Any,
    absmax: Any,
    _first: Any,
    _shift: Any,
    x: Any,
    _start: Any,
    _columns: Any,
) -> Any:
    """Of the ``columns`` elements from number ``start`` on, in blocks of 2 to the ``shift``; all three are multiples of 32.

    ``absmax`` begins with block ``first``; ``x`` is as :func:`_apart` leaves it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, absmax, first, shift, x, start, columns = arguments
        kinds = signature.args
        totals = zeros(builder, _SUMS)

        def product(levels_here: Any, column: Any) -> Any:
            values = builder.load(pointer(context, builder, kinds[4], x, column, _FLOATS), align=4)
            return builder.fmul(levels_here, values, flags=("contract",))

        def byte(element: Any, of: Any, ahead: int = 0) -> Any:
            at = builder.add(builder.lshr(element, _INDEX(1)), _INDEX(ahead))
            return pointer(context, builder, kinds[0], codes, at, of)

        for width, vector in loops(builder, builder.sdiv(columns, _INDEX(_STEP)), _SUMS):
            if width == _SUMS:  # whose codes are a line
                soon = builder.add(start, builder.mul(vector, _INDEX(_STEP)))
                ask_for(builder, byte(soon, _BYTES.element, AHEAD), NEAR)
            for part in range(width):
                column = builder.mul(builder.add(vector, _INDEX(part)), _INDEX(_STEP))
                element = builder.add(start, column)
                found = builder.load(byte(element, _BYTES), align=1)
                block = builder.sub(builder.lshr(element, shift), first)
                scale = builder.load(pointer(context, builder, kinds[1], absmax, block, _FLOAT))
                products = [
                    product(values, builder.add(column, _INDEX(half * LANES)))
                    for half, values in enumerate(_levels_of(context, builder, found))
                ]
                more = builder.fadd(*products, flags=("contract",))
                more = builder.fmul(more, splat(builder, scale, _FLOATS), flags=("contract",))
                more = builder.fadd(builder.load(totals[part]), more, flags=("contract",))
                builder.store(more, totals[part])
        summed = builder.load(totals[0])
        for total in totals[1:]:
            summed = builder.fadd(summed, builder.load(total))
        return sum_of_lanes(builder, summed)

    i64 = types.int64
    return types.float32(codes, absmax, i64, i64, x, i64, i64), generate


def takes(weight: tuple[Any, ...]) -> bool:
    """Whether :func:`matmul_one`, or :func:`matmul_one_nested`, can multiply: no row, and no block, begins inside of 32 elements."""
    *_, shift, columns = weight
    return bool(columns % _STEP == 0 and 1 << shift >= _STEP)


@jit(borrows=True)
def _apart(x: Any, out: Any) -> None:
    """The even ones of each 32 columns, then the odd ones; or four odd ones, four even ones, the next four odd ones."""
    if _is_by_bytes():
        for start in range(0, out.size, 8):
            for i in range(4):
                out[start + i] = x[start + 2 * i + 1]
                out[start + 4 + i] = x[start + 2 * i]
        return
    for start in range(0, out.size, _STEP):
        for i in range(LANES):
            out[start + i] = x[start + 2 * i]
            out[start + LANES + i] = x[start + 2 * i + 1]


@jit(parallel=True)
def matmul_one(weight: Any, threads: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``; ``weight`` as in :func:`modulora_nf4.cpu_decode.decode`."""
    codes, absmax, shift, columns = weight
    rows = y.shape[1]
    apart = np.empty(columns, np.float32)
    _apart(x[0], apart)
    for index in prange(threads):
        begin, stop = share(index, threads, rows)
        for o in range(begin, stop):
            y[0, o] = _row_product(codes, absmax, 0, shift, apart, o * columns, columns)


@jit(parallel=True)
def matmul_one_nested(weight: Any, threads: int, x: Any, y: Any) -> None:
    """The same of a weight as in :func:`modulora_nf4.cpu_decode.decode_nested`: constants of a few rows at a time are in the L1 cache."""
    codes, absmax_codes, constants, mean, shift, columns = weight
    rows = y.shape[1]
    apart = np.empty(columns, np.float32)
    _apart(x[0], apart)
    for index in prange(threads):
        begin, stop = share(index, threads, rows)
        absmax = np.empty((_ROWS * columns >> shift) + 2, np.float32)
        for first in range(begin, stop, _ROWS):
            last = min(first + _ROWS, stop)
            block, end = first * columns >> shift, (last * columns - 1 >> shift) + 1
            put_absmax(absmax_codes, constants, mean, block, absmax[: end - block])
            for o in range(first, last):
                y[0, o] = _row_product(codes, absmax, block, shift, apart, o * columns, columns)
