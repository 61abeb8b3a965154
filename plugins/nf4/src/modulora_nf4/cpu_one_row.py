"""The product of one row with NF4's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_k level[code[o, k]] absmax[block of (o, k)] x[k]

Sixteen bytes hold 32 codes, the even columns' in their high halves and the odd columns' in the low ones. Levels of either sixteen are
looked up and multiplied in registers, by an x whose even and odd columns were put apart first, and the sum of both is scaled: nothing
decoded is stored. A weight of out · in values takes out · in / 2 bytes and 4 bytes a block, read once, and seven operations for each 32
values. The floor is the larger of bytes / bandwidth and operations / peak.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.prefetch import AHEAD, NEAR, ask_for
from modulora_core.kernels.shares import share
from modulora_core.kernels.vectors import LANES, loops, pointer, splat, sum_of_lanes, zeros
from modulora_nf4.cpu_decode import levels, put_absmax

_STEP = 2 * LANES  # columns that are multiplied at once
_ROWS = 16  # whose constants are computed at once, where they are quantized too
_SUMS = 4  # a multiplier waits for its own result: so many sums are made side by side

_INDEX = ir.IntType(64)
_BYTES, _WHOLES, _FLOATS = (
    ir.VectorType(of, LANES) for of in (ir.IntType(8), ir.IntType(32), ir.FloatType())
)


@intrinsic
def _row_product(
    _context: Any, codes: Any, absmax: Any, _first: Any, _shift: Any, x: Any, _start: Any, _columns: Any
) -> Any:
    """Of the ``columns`` elements from number ``start`` on, in blocks of 2 to the ``shift``; all three are multiples of 32.

    ``absmax`` begins with block ``first``; ``x`` is as :func:`_apart` leaves it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, absmax, first, shift, x, start, columns = arguments
        kinds = signature.args
        totals = zeros(builder, _SUMS)

        def product(index: Any, column: Any) -> Any:
            values = builder.load(pointer(context, builder, kinds[4], x, column, _FLOATS), align=4)
            return builder.fmul(levels(context, builder, index), values, flags=("contract",))

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
                source = byte(element, _BYTES)
                odd = builder.zext(
                    builder.load(source, align=1), _WHOLES
                )  # levels() looks at the low half alone
                even = builder.lshr(odd, ir.Constant(_WHOLES, [4] * LANES))
                block = builder.sub(builder.lshr(element, shift), first)
                scale = builder.load(pointer(context, builder, kinds[1], absmax, block, ir.FloatType()))
                more = builder.fadd(
                    product(even, column),
                    product(odd, builder.add(column, _INDEX(LANES))),
                    flags=("contract",),
                )
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
    """The even ones of each 32 columns, then the odd ones."""
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
