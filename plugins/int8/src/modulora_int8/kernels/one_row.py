"""The product of one row with INT8's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_g (scale[o, g] / 127) Σ_k code[o, k] x[k]        over the columns k of group g

Codes are multiplied as they are, sixteen at a time, and the sums of a group are scaled: nothing decoded is stored. A weight of out · in
values takes out · in bytes and 4 a group, read once, and three operations for each sixteen values. The floor is the larger of bytes /
bandwidth and operations / peak; from memory it is the bytes.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.prefetch import AHEAD, NEAR, ask_for
from modulora_core.kernels.cpu.shares import share
from modulora_core.kernels.cpu.vectors import LANES, loops, pointer, splat, sum_of_lanes
from modulora_int8.kernels.decode import INVERSE, numbers

_SUMS = 4  # a multiplier waits for its own result: so many sums are made side by side

_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)


@intrinsic
def _row_product(
    _context: Any, codes: Any, _at: Any, _columns: Any, scales: Any, _scale_at: Any, _group: Any, x: Any
) -> Any:  # fmt: skip
    """Of the row whose ``columns`` begin at ``codes[at]``, and whose scales at ``scales[scale_at]``: without the factor INVERSE.

    ``columns`` and, unless it is as many or more, ``group`` are multiples of sixteen.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, at, columns, scales, scale_at, group, x = arguments
        kinds = signature.args
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        total, *sums = (cgutils.alloca_once(builder, _FLOATS) for _ in range(1 + _SUMS))
        builder.store(zero, total)
        groups = builder.sdiv(builder.add(columns, builder.sub(group, _INDEX(1))), group)
        with cgutils.for_range(builder, groups) as of_group:
            for place in sums:
                builder.store(zero, place)
            begin = builder.mul(of_group.index, group)
            left = builder.sub(columns, begin)
            size = builder.select(builder.icmp_signed("<", left, group), left, group)
            for width, vector in loops(builder, builder.sdiv(size, _INDEX(LANES)), _SUMS):
                if width == _SUMS:  # whose codes are a line
                    soon = builder.add(builder.add(at, begin), builder.mul(vector, _INDEX(LANES)))
                    soon = builder.add(soon, _INDEX(AHEAD))
                    ask_for(
                        builder,
                        pointer(context, builder, kinds[0], codes, soon, ir.IntType(8)),
                        NEAR,
                    )
                for part in range(width):
                    k = builder.mul(builder.add(vector, _INDEX(part)), _INDEX(LANES))
                    column = builder.add(begin, k)
                    values = builder.load(
                        pointer(context, builder, kinds[6], x, column, _FLOATS), align=4
                    )
                    product = builder.fmul(
                        numbers(context, builder, kinds[0], codes, builder.add(at, column)),
                        values,
                        flags=("contract",),
                    )
                    more = builder.fadd(builder.load(sums[part]), product, flags=("contract",))
                    builder.store(more, sums[part])
            summed = functools.reduce(builder.fadd, map(builder.load, sums))
            place = pointer(
                context, builder, kinds[3], scales, builder.add(scale_at, of_group.index), _FLOAT
            )
            product = builder.fmul(
                summed, splat(builder, builder.load(place), _FLOATS), flags=("contract",)
            )
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        return sum_of_lanes(builder, builder.load(total))

    i64 = types.int64
    return types.float32(codes, i64, i64, scales, i64, i64, x), generate


@jit(parallel=True)
def matmul_one(weight: Any, threads: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``; ``weight`` as in :func:`modulora_int8.kernels.decode.decode`."""
    codes, scales, group = weight
    rows, columns = codes.shape
    groups = scales.shape[1]
    for index in prange(threads):
        begin, stop = share(index, threads, rows)
        for o in range(begin, stop):
            y[0, o] = (
                _row_product(codes, o * columns, columns, scales, o * groups, group, x) * INVERSE
            )


def one_row(weight: tuple[Any, ...]) -> Any:
    """:func:`matmul_one`, if no row and no group ends inside of sixteen columns."""
    codes, _, group = weight
    columns = codes.shape[1]
    fits = columns % LANES == 0 and (group % LANES == 0 or group >= columns)
    return matmul_one if fits else None
