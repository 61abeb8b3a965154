"""The product of one row with OPTQ's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_k (code[o, k] − zero[o, g]) scale[o, g] x[k]        g = k // group

Sixteen bytes of a row hold codes of ⌈8 / bits⌉ times sixteen columns, at the same bits (:mod:`modulora_optq.packing`). They are loaded
once, and each part of them is shifted out, made a number, scaled and multiplied by its x in registers: nothing decoded is stored. A
code becomes fp32 by its bits: those of 2²³ with the code in the lowest places are the number 2²³ + code, exactly.

What it moves and does, for a weight of out · in values: out · in · bits / 8 bytes are read once; five operations for each sixteen
values and a few for each group. The floor is the larger of bytes / bandwidth and five operations / peak.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.vectors import LANES, from_half, pointer, splat, sum_of_lanes
from modulora_optq.cpu_decode import unpack

_ROWS = 16  # rows that a thread takes at once
_EXACT = np.float32(2**23)

_INDEX, _WHOLE = ir.IntType(64), ir.IntType(32)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_HALF = ir.VectorType(ir.IntType(8), LANES // 2)
_WHOLES = ir.VectorType(_WHOLE, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


def _lanes(values: Any) -> Any:
    return ir.Constant(_WHOLES, list(values))


def _same(value: int) -> Any:
    return _lanes([value] * LANES)


def _high_bits(builder: Any, plane: Any, j: Any, part: Any) -> Any:
    """What bytes ``j ...`` of the plane of one bit a code hold of sixteen columns: that bit is the lowest where ``j`` is below ``part``.

    The plane has eight parts of ``part`` bytes, half as long as those of the low bits, so an odd one may begin after eight of the
    columns: they are loaded by eights.
    """
    halves = []
    for first in (0, LANES // 2):
        at = builder.add(j, _INDEX(first))
        beyond = builder.icmp_signed(">=", at, part)
        byte = builder.select(beyond, builder.sub(at, part), at)
        source = builder.bitcast(builder.gep(plane, [byte]), _HALF.as_pointer())
        wide = builder.zext(builder.load(source, align=1), ir.VectorType(_WHOLE, LANES // 2))
        shift = builder.select(beyond, _WHOLE(1), _WHOLE(0))
        halves.append(builder.lshr(wide, splat(builder, shift, wide.type)))
    return builder.shuffle_vector(*halves, _lanes(range(LANES)))


def _row_product(bits: int) -> Any:
    """The intrinsic for a width."""
    width = 2 if bits == 3 else bits
    parts = 8 // width

    @intrinsic
    def row_product(
        _context: Any, packed: Any, _row: Any, _part: Any, x: Any, groups: Any, zeros: Any, scales: Any
    ) -> Any:
        """Of the row that begins at ``packed[row]``, whose low bits' parts are ``part`` bytes long, a multiple of sixteen."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, row, part, x, groups, zeros, scales = arguments
            kinds = signature.args

            def number_of(kind: int, array: Any, index: Any, of: Any) -> Any:
                """An element, in all lanes."""
                place = pointer(context, builder, kinds[kind], array, index, of.element)
                return splat(builder, builder.load(place), of)

            data = pointer(context, builder, kinds[0], packed, row, ir.IntType(8))
            high = builder.gep(data, [part])
            half = builder.sdiv(part, _INDEX(2))
            totals = [cgutils.alloca_once(builder, _FLOATS) for _ in range(parts)]
            for total in totals:
                builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
            with cgutils.for_range(builder, builder.sdiv(part, _INDEX(LANES))) as loop:
                j = builder.mul(loop.index, _INDEX(LANES))
                source = builder.bitcast(builder.gep(data, [j]), _BYTES.as_pointer())
                low_bits = builder.zext(builder.load(source, align=1), _WHOLES)
                high_bits = _high_bits(builder, high, j, half) if bits == 3 else None
                for p, total in enumerate(totals):
                    code = builder.and_(builder.lshr(low_bits, _same(width * p)), _same(2**width - 1))
                    if high_bits is not None:
                        bit = builder.and_(builder.lshr(high_bits, _same(2 * p)), _same(1))
                        code = builder.or_(code, builder.shl(bit, _same(2)))
                    number = builder.bitcast(builder.or_(code, _same(0x4B000000)), _FLOATS)
                    column = builder.add(j, builder.mul(part, _INDEX(p)))
                    vector = builder.sdiv(column, _INDEX(LANES))
                    place = pointer(context, builder, kinds[4], groups, vector, _WHOLE)
                    group = builder.sext(builder.load(place), _INDEX)
                    steps = builder.fsub(number, number_of(5, zeros, group, _FLOATS))
                    weight = builder.fmul(steps, number_of(6, scales, group, _FLOATS))
                    values = builder.load(pointer(context, builder, kinds[3], x, column, _FLOATS), align=4)
                    product = builder.fmul(weight, values, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            summed = builder.load(totals[0])
            for total in totals[1:]:
                summed = builder.fadd(summed, builder.load(total))
            return sum_of_lanes(builder, summed)

        i64 = types.int64
        return types.float32(packed, i64, i64, x, groups, zeros, scales), generate

    return row_product


_product_2, _product_3, _product_4, _product_8 = (_row_product(bits) for bits in (2, 3, 4, 8))


def takes(weight: tuple[Any, ...]) -> bool:
    """Whether :func:`matmul_one` can multiply: no part of a row, and no group, ends inside of sixteen columns."""
    bits, group, columns = (int(number) for number in weight[3:])
    parts = 8 // (2 if bits == 3 else bits)
    return columns % (LANES * parts) == 0 and (group % LANES == 0 or group >= columns)


@jit()
def _groups(columns: int, group: int) -> Any:
    """The group of each sixteen columns."""
    groups = np.empty(columns // LANES, np.int32)
    for k in range(groups.size):
        groups[k] = k * LANES // group
    return groups


@jit()
def _steps(scales: Any, zeros: Any, bits: int, o: int, scratch: Any, zero: Any, scale: Any) -> None:
    """The zeros of row ``o``, 2²³ more than they are, and its scales, as fp32 ``[groups]``."""
    rows, groups = scales.shape
    of_row = scales[o]
    for g in range(groups):
        scale[g] = from_half(of_row[g])
    if zeros.size:
        unpack(zeros, o * (zeros.size // rows), bits, groups, 0, groups, scratch, 0)
        for g in range(groups):
            zero[g] = _EXACT + np.float32(scratch[g])


@jit(parallel=True)
def matmul_one(weight: Any, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``; ``weight`` as in :func:`modulora_optq.cpu_decode.decode`."""
    codes, scales, zeros, bits, group, n = weight
    rows, groups = scales.shape
    group_of = _groups(n, group)
    part = n // (8 // (2 if bits == 3 else bits))
    row_bytes = codes.size // max(1, rows)
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        scratch = np.empty(groups + 64, np.uint8)  # unpack writes up to 63 bytes too many
        scale = np.empty(groups, np.float32)
        zero = np.full(groups, _EXACT + np.float32(1 << (bits - 1)), np.float32)
        begin = np.int64(piece) * _ROWS
        for o in range(begin, min(begin + _ROWS, rows)):
            _steps(scales, zeros, bits, o, scratch, zero, scale)
            if bits == 2:
                y[0, o] = _product_2(codes, o * row_bytes, part, x, group_of, zero, scale)
            elif bits == 3:
                y[0, o] = _product_3(codes, o * row_bytes, part, x, group_of, zero, scale)
            elif bits == 4:
                y[0, o] = _product_4(codes, o * row_bytes, part, x, group_of, zero, scale)
            else:
                y[0, o] = _product_8(codes, o * row_bytes, part, x, group_of, zero, scale)
