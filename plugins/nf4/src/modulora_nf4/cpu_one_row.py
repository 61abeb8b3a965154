"""The product of one row with NF4's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_k level[code[o, k]] absmax[block of (o, k)] x[k]

Sixteen levels are looked up, scaled and multiplied in registers: nothing decoded is stored. A weight of out · in values takes
out · in / 2 bytes and 4 bytes a block, read once, and about eight operations for each sixteen values. The floor is the larger of bytes /
bandwidth and operations / peak.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.vectors import LANES, loops, pointer, splat, sum_of_lanes
from modulora_nf4.cpu_decode import sixteen_levels

_ROWS = 16  # rows that a thread takes at once
_SUMS = 4  # a multiplier waits for its own result: so many sums are made side by side

_INDEX = ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), LANES // 2)


@intrinsic
def _row_product(
    _context: Any, codes: Any, absmax: Any, _shift: Any, x: Any, _start: Any, _columns: Any
) -> Any:  # fmt: skip
    """Of the ``columns`` elements from number ``start`` on, in blocks of 2 to the ``shift``; all three are multiples of sixteen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, absmax, shift, x, start, columns = arguments
        kinds = signature.args
        vector_type = ir.VectorType(ir.FloatType(), LANES)
        totals = [cgutils.alloca_once(builder, vector_type) for _ in range(_SUMS)]
        for total in totals:
            builder.store(ir.Constant(vector_type, [0.0] * LANES), total)
        for width, vector in loops(builder, builder.sdiv(columns, _INDEX(LANES)), _SUMS):
            for part in range(width):
                column = builder.mul(builder.add(vector, _INDEX(part)), _INDEX(LANES))
                element = builder.add(start, column)
                source = pointer(context, builder, kinds[0], codes, builder.lshr(element, _INDEX(1)), _BYTES)
                levels = sixteen_levels(context, builder, builder.load(source, align=1))
                block = builder.lshr(element, shift)
                scale = builder.load(pointer(context, builder, kinds[1], absmax, block, ir.FloatType()))
                weight = builder.fmul(levels, splat(builder, scale, vector_type))
                values = builder.load(pointer(context, builder, kinds[3], x, column, vector_type), align=4)
                product = builder.fmul(weight, values, flags=("contract",))
                more = builder.fadd(builder.load(totals[part]), product, flags=("contract",))
                builder.store(more, totals[part])
        summed = builder.load(totals[0])
        for total in totals[1:]:
            summed = builder.fadd(summed, builder.load(total))
        return sum_of_lanes(builder, summed)

    i64 = types.int64
    return types.float32(codes, absmax, i64, x, i64, i64), generate


def takes(weight: tuple[Any, ...]) -> bool:
    """Whether :func:`matmul_one` can multiply: no row, and no block, begins inside of sixteen elements, and all blocks are there."""
    first, shift, columns = (int(number) for number in weight[2:])
    return first == 0 and columns % LANES == 0 and 1 << shift >= LANES


@jit(parallel=True)
def matmul_one(weight: Any, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``; ``weight`` as in :func:`modulora_nf4.cpu_decode.decode`."""
    codes, absmax, _, shift, columns = weight
    rows = y.shape[1]
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        begin = np.int64(piece) * _ROWS
        for o in range(begin, min(begin + _ROWS, rows)):
            y[0, o] = _row_product(codes, absmax, shift, x, o * columns, columns)
