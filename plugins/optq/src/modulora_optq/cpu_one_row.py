"""The product of one row with OPTQ's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_k (code[o, k] − zero[o, g]) scale[o, g] x[k]                                    g = k // group
         = Σ_g scale[o, g] (Σ_{k in g} (code[o, k] − middle) x[k] − (zero[o, g] − middle) Σ_{k in g} x[k])

Codes are counted from the middle one, 2^(bits − 1), so that the second term is small, and none for a symmetric weight. The sums of x are
the same for all rows, so of each group only one number is left of the zeros.

Sixteen bytes of a row hold codes of ⌈8 / bits⌉ times sixteen columns, at the same bits (:mod:`modulora_optq.packing`). They are loaded
once, and each part of them is shifted down, looked up in a register and multiplied by its x: nothing decoded is stored. Codes of 8 bits
are converted. Where a part comes to its next group its sum is scaled and added to that of the row.

What it moves and does, for a weight of out · in values: out · in · bits / 8 bytes are read once; three operations for each sixteen
values, five at 3 bits, and some ten for each group. The floor is the larger of bytes / bandwidth and operations / peak.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.conversions import halves_to_floats
from modulora_core.kernels.shares import share
from modulora_core.kernels.vectors import LANES, matrix, pointer, splat
from modulora_optq.cpu_row_product import (
    add_run_2,
    add_run_3,
    add_run_4,
    add_run_8,
    parts_of_byte,
    runs_of_groups,
    sum_of,
)

_ROWS = LANES  # rows that a thread takes at once

_INDEX, _WHOLE, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_WHOLES, _FLOATS = ir.VectorType(_WHOLE, LANES), ir.VectorType(_FLOAT, LANES)


def takes(weight: tuple[Any, ...]) -> bool:
    """Whether :func:`matmul_one` can multiply: no part of a row, and no group, ends inside of sixteen columns."""
    bits, group, columns = weight[3:]
    return bool(columns % (LANES * parts_of_byte(bits)) == 0 and (group % LANES == 0 or group >= columns))


@jit()
def _places(bits: int, groups: int) -> Any:
    """Where the zeros of a row have their low bits, and of 3 the third one: bytes and by how much to shift them, int32 ``[groups, 4]``."""
    width, high = 2 if bits == 3 else bits, (groups + 7) // 8
    low = (groups * width + 7) // 8
    places = np.empty((groups, 4), np.int32)
    for g in range(groups):
        places[g, 0], places[g, 1] = g % low, g // low * width
        places[g, 2], places[g, 3] = low + g % high, g // high
    return places


@jit(fastmath=("reassoc", "nsz"))  # in vectors: a sum by ones waits for each addition
def _sums_of_groups(x: Any, group: int, groups: int) -> Any:
    """``Σ x`` of each group of columns, fp32 ``[groups]``; the last one may be shorter."""
    sums = np.empty(groups, np.float32)
    for g in range(groups):
        total = np.float32(0)
        for k in range(g * group, min((g + 1) * group, x.size)):
            total += x[k]
        sums[g] = total
    return sums


def _of_rows(builder: Any, data: Any, first: Any, last: Any, step: Any) -> Any:
    """``data[first + min(r, last) step]`` for sixteen r, as a vector."""
    values = ir.Constant(ir.VectorType(data.type.pointee, _ROWS), ir.Undefined)
    for r in range(_ROWS):
        row = builder.select(builder.icmp_signed(">", _INDEX(r), last), last, _INDEX(r))
        at = builder.add(first, builder.mul(row, step))
        values = builder.insert_element(values, builder.load(builder.gep(data, [at])), _WHOLE(r))
    return values


@intrinsic
def _take_scales(_context: Any, scales: Any, _first: Any, _last: Any, _g: Any, out: Any) -> Any:
    """``out[g, r] = scales[first + min(r, last), g]`` for sixteen r, in fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scales, first, last, g, out = arguments
        data, groups = matrix(context, builder, signature.args[0], scales)
        bits = _of_rows(builder, data, builder.add(builder.mul(first, groups), g), last, groups)
        place = pointer(context, builder, signature.args[4], out, builder.mul(g, _INDEX(_ROWS)), _FLOATS)
        builder.store(halves_to_floats(context, builder, bits), place, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(scales, i64, i64, i64, out), generate


@intrinsic
def _add_zeros(
    _context: Any, zeros: Any, _first: Any, _last: Any, _step: Any, _bits: Any, places: Any, _g: Any, scale: Any, _sum: Any, out: Any
) -> Any:  # fmt: skip
    """``out[r] += scale[g, r] (zero[r, g] − middle) sum`` for the sixteen rows whose zeros begin at ``zeros[first + min(r, last) step]``.

    A row has few zeros, each in another place of a byte, so what sixteen rows have in one place is computed side by side.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros, first, last, step, bits, places, g, scale, factor, out = arguments
        kinds = signature.args
        data = pointer(context, builder, kinds[0], zeros, first, ir.IntType(8))
        place = pointer(context, builder, kinds[5], places, builder.mul(g, _INDEX(4)), _WHOLE)

        def plane(field: int, mask: Any) -> Any:
            at, shift = (builder.load(builder.gep(place, [_INDEX(field + i)])) for i in (0, 1))
            found = builder.zext(_of_rows(builder, data, builder.sext(at, _INDEX), last, step), _WHOLES)
            return builder.and_(
                builder.lshr(found, splat(builder, shift, _WHOLES)), splat(builder, mask, _WHOLES)
            )

        is_three = builder.icmp_signed("==", bits, _INDEX(3))
        bits = builder.trunc(bits, _WHOLE)
        width = builder.select(is_three, _WHOLE(2), bits)
        zero = cgutils.alloca_once(builder, _WHOLES)
        builder.store(plane(0, builder.sub(builder.shl(_WHOLE(1), width), _WHOLE(1))), zero)
        with builder.if_then(is_three):
            third = builder.shl(plane(2, _WHOLE(1)), ir.Constant(_WHOLES, [2] * _ROWS))
            builder.store(builder.or_(builder.load(zero), third), zero)
        middle_code = splat(builder, builder.shl(_WHOLE(1), builder.sub(bits, _WHOLE(1))), _WHOLES)
        steps = builder.sitofp(builder.sub(builder.load(zero), middle_code), _FLOATS)
        of_group = pointer(context, builder, kinds[7], scale, builder.mul(g, _INDEX(_ROWS)), _FLOATS)
        more = builder.fmul(
            builder.fmul(steps, splat(builder, factor, _FLOATS)), builder.load(of_group, align=4)
        )
        target = pointer(context, builder, kinds[9], out, _INDEX(0), _FLOATS)
        builder.store(builder.fadd(builder.load(target, align=4), more), target, align=4)
        return context.get_dummy_value()

    i64, f32 = types.int64, types.float32
    return types.void(zeros, i64, i64, i64, i64, places, i64, scale, f32, out), generate


@jit(borrows=True)
def _add_runs(
    codes: Any, at: int, row_bytes: int, count: int, bits: int, part: int, ends: Any, group_of: Any, x: Any, scale: Any, totals: Any
) -> None:  # fmt: skip
    """The runs of ``count`` rows, the first of which begins at ``codes[at]``, to ``totals``: see :mod:`modulora_optq.cpu_row_product`."""
    start = np.int64(0)
    for run in range(ends.size):
        end = np.int64(ends[run])
        if bits == 2:
            add_run_2(codes, at, row_bytes, count, part, start, end, x, group_of, run, scale, totals)
        elif bits == 3:
            add_run_3(codes, at, row_bytes, count, part, start, end, x, group_of, run, scale, totals)
        elif bits == 4:
            add_run_4(codes, at, row_bytes, count, part, start, end, x, group_of, run, scale, totals)
        else:
            add_run_8(codes, at, row_bytes, count, part, start, end, x, group_of, run, scale, totals)
        start = end


@jit(parallel=True)
def matmul_one(weight: Any, threads: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``; ``weight`` as in :func:`modulora_optq.cpu_decode.decode`."""
    codes, scales, zeros, bits, group, n = weight
    rows, groups = scales.shape
    parts = parts_of_byte(bits)
    part = n // parts
    ends, group_of = runs_of_groups(part, parts, group)
    places, sums = _places(bits, groups), _sums_of_groups(x[0], group, groups)
    row_bytes, zero_bytes = codes.size // max(1, rows), zeros.size // max(1, rows)
    for index in prange(threads):
        start, stop = share(index, threads, rows, _ROWS)
        scale = np.empty((groups, _ROWS), np.float32)
        above, totals = np.empty(_ROWS, np.float32), np.empty((_ROWS, LANES), np.float32)
        for begin in range(start, stop, _ROWS):
            count = min(_ROWS, stop - begin)
            above[:], totals[:] = 0, 0
            for g in range(groups):
                _take_scales(scales, begin, count - 1, g, scale)
                if zeros.size:
                    _add_zeros(
                        zeros, begin * zero_bytes, count - 1, zero_bytes, bits, places, g, scale, sums[g], above
                    )  # fmt: skip
            _add_runs(
                codes, begin * row_bytes, row_bytes, count, bits, part, ends, group_of, x, scale, totals
            )
            for r in range(count):
                y[0, begin + r] = sum_of(totals, r) - above[r]
