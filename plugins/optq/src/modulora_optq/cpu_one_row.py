"""The product of one row with OPTQ's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_k (code[o, k] − zero[o, g]) scale[o, g] x[k]        g = k // group

Sixteen bytes of a row hold codes of ⌈8 / bits⌉ times sixteen columns, at the same bits (:mod:`modulora_optq.packing`). They are loaded
once, and each part of them is shifted down, looked up and multiplied by its x in registers: nothing decoded is stored. What is looked up,
(code − zero) scale for all codes, is a table in a register too, made anew where a part of the row comes to its next group; codes of 8 bits
are too many for that, and are subtracted from and scaled one by one.

What it moves and does, for a weight of out · in values: out · in · bits / 8 bytes are read once; three operations for each sixteen
values, five at 3 bits and four at 8, and a few for each group. The floor is the larger of bytes / bandwidth and operations / peak.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from modulora_core.kernels import jit
from modulora_core.kernels.conversions import from_half
from modulora_core.kernels.prefetch import read_ahead
from modulora_core.kernels.vectors import LANES, lookup, pointer, splat, sum_of_lanes
from modulora_optq.cpu_decode import unpack

_ROWS = 16  # rows that a thread takes at once

_INDEX, _WHOLE, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_HALF = ir.VectorType(ir.IntType(8), LANES // 2)
_WHOLES = ir.VectorType(_WHOLE, LANES)
_FLOATS = ir.VectorType(_FLOAT, LANES)


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


@register_jitable
def _parts(bits: int) -> int:
    """How many codes' low bits a byte holds."""
    return 8 // (2 if bits == 3 else bits)


def _index(builder: Any, bits: int, low_bits: Any, high_bits: Any, p: int) -> Any:
    """The codes of part ``p``; at 2, 3 and 4 bits there may be others above, which a table that repeats itself doesn't mind."""
    shifted = builder.lshr(low_bits, _same((2 if bits == 3 else bits) * p))
    if bits != 3:
        return shifted
    above = builder.lshr(high_bits, _same(2 * p - 2)) if p else builder.shl(high_bits, _same(2))
    return builder.or_(builder.and_(shifted, _same(3)), builder.and_(above, _same(~3)))


def _weights(context: Any, builder: Any, bits: int, index: Any, zero: Any, scale: Any) -> Any:
    """(code − zero) scale of sixteen codes; of a table of them, ``scale``, where there is one."""
    if bits < 8:
        return lookup(context, builder, scale, index)
    return builder.fmul(builder.fsub(builder.uitofp(index, _FLOATS), zero), scale)


def _row_product(bits: int) -> Any:
    """The intrinsic for a width."""
    parts = _parts(bits)

    @intrinsic
    def row_product(
        _context: Any, packed: Any, _row: Any, _part: Any, x: Any, ends: Any, groups: Any, zeros: Any, scales: Any
    ) -> Any:  # fmt: skip
        """Of the row that begins at ``packed[row]``, whose low bits' parts are ``part`` bytes long, a multiple of sixteen.

        ``ends`` and ``groups`` are those of :func:`_runs`; ``zeros`` and ``scales`` are of the row.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, row, part, x, ends, groups, zeros, scales = arguments
            kinds = signature.args

            def number(kind: int, array: Any, index: Any, of: Any) -> Any:
                return builder.load(pointer(context, builder, kinds[kind], array, index, of))

            data = pointer(context, builder, kinds[0], packed, row, ir.IntType(8))
            high, half = builder.gep(data, [part]), builder.sdiv(part, _INDEX(2))
            totals, zero_of, scale_of = (
                [cgutils.alloca_once(builder, _FLOATS) for _ in range(parts)] for _ in range(3)
            )
            for total in totals:
                builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
            begin = cgutils.alloca_once(builder, _INDEX)
            builder.store(_INDEX(0), begin)
            runs = cgutils.unpack_tuple(
                builder, context.make_array(kinds[4])(context, builder, ends).shape, 1
            )[0]
            with cgutils.for_range(builder, runs) as run:
                for p in range(parts):
                    at = builder.add(builder.mul(run.index, _INDEX(parts)), _INDEX(p))
                    group = builder.sext(number(5, groups, at, _WHOLE), _INDEX)
                    zero = splat(builder, number(6, zeros, group, _FLOAT), _FLOATS)
                    scale = splat(builder, number(7, scales, group, _FLOAT), _FLOATS)
                    if bits < 8:
                        scale = builder.fmul(builder.fsub(ir.Constant(_FLOATS, _codes(bits)), zero), scale)
                    builder.store(zero, zero_of[p])
                    builder.store(scale, scale_of[p])
                first, end = builder.load(begin), builder.sext(number(4, ends, run.index, _WHOLE), _INDEX)
                builder.store(end, begin)
                vectors = builder.sdiv(builder.sub(end, first), _INDEX(LANES))
                with cgutils.for_range(builder, vectors) as loop:
                    j = builder.add(first, builder.mul(loop.index, _INDEX(LANES)))
                    source = builder.bitcast(builder.gep(data, [j]), _BYTES.as_pointer())
                    low_bits = builder.zext(builder.load(source, align=1), _WHOLES)
                    high_bits = _high_bits(builder, high, j, half) if bits == 3 else None
                    for p, total in enumerate(totals):
                        index = _index(builder, bits, low_bits, high_bits, p)
                        zero, scale = builder.load(zero_of[p]), builder.load(scale_of[p])
                        weight = _weights(context, builder, bits, index, zero, scale)
                        column = builder.add(j, builder.mul(part, _INDEX(p)))
                        values = builder.load(
                            pointer(context, builder, kinds[3], x, column, _FLOATS), align=4
                        )
                        product = builder.fmul(weight, values, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            summed = builder.load(totals[0])
            for total in totals[1:]:
                summed = builder.fadd(summed, builder.load(total))
            return sum_of_lanes(builder, summed)

        i64 = types.int64
        return types.float32(packed, i64, i64, x, ends, groups, zeros, scales), generate

    return row_product


def _codes(bits: int) -> list[float]:
    """The code that each four bits hold: the lowest of them, if there are fewer."""
    return [float(i % 2**bits) for i in range(LANES)]


_product_2, _product_3, _product_4, _product_8 = (_row_product(bits) for bits in (2, 3, 4, 8))


def takes(weight: tuple[Any, ...]) -> bool:
    """Whether :func:`matmul_one` can multiply: no part of a row, and no group, ends inside of sixteen columns."""
    bits, group, columns = (int(number) for number in weight[3:])
    return columns % (LANES * _parts(bits)) == 0 and (group % LANES == 0 or group >= columns)


@jit()
def _runs(part: int, parts: int, group: int) -> Any:
    """Where the bytes of a row's parts are cut so that no part comes to another group inside of a run, and which groups these are.

    The ends of the runs, int32 ``[runs]``, and int32 ``[runs, parts]``.
    """
    ends, groups = np.empty(part // LANES, np.int32), np.empty((part // LANES, parts), np.int32)
    runs = 0
    for start in range(0, part, LANES):
        new = start == 0
        for p in range(parts):
            new = new or (p * part + start) // group != groups[runs - 1, p]
        if new:
            for p in range(parts):
                groups[runs, p] = (p * part + start) // group
            runs += 1
        ends[runs - 1] = start + LANES
    return ends[:runs], groups[:runs]


@jit()
def _steps(scales: Any, zeros: Any, bits: int, o: int, scratch: Any, zero: Any, scale: Any) -> None:
    """The zeros of row ``o`` and its scales, as fp32 ``[groups]``; where no zeros are stored, ``zero`` is left as it is."""
    rows, groups = scales.shape
    of_row = scales[o]
    for g in range(groups):
        scale[g] = from_half(of_row[g])
    if zeros.size:
        unpack(zeros, o * (zeros.size // rows), bits, groups, 0, groups, scratch, 0)
        for g in range(groups):
            zero[g] = np.float32(scratch[g])


@jit(parallel=True)
def matmul_one(weight: Any, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``; ``weight`` as in :func:`modulora_optq.cpu_decode.decode`."""
    codes, scales, zeros, bits, group, n = weight
    rows, groups = scales.shape
    parts = _parts(bits)
    part = n // parts
    ends, group_of = _runs(part, parts, group)
    row_bytes = codes.size // max(1, rows)
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        scratch = np.empty(groups + 64, np.uint8)  # unpack writes up to 63 bytes too many
        scale = np.empty(groups, np.float32)
        zero = np.full(groups, np.float32(1 << (bits - 1)), np.float32)
        begin = np.int64(piece) * _ROWS
        for o in range(begin, min(begin + _ROWS, rows)):
            read_ahead(codes, o * row_bytes, row_bytes)
            _steps(scales, zeros, bits, o, scratch, zero, scale)
            if bits == 2:
                y[0, o] = _product_2(codes, o * row_bytes, part, x, ends, group_of, zero, scale)
            elif bits == 3:
                y[0, o] = _product_3(codes, o * row_bytes, part, x, ends, group_of, zero, scale)
            elif bits == 4:
                y[0, o] = _product_4(codes, o * row_bytes, part, x, ends, group_of, zero, scale)
            else:
                y[0, o] = _product_8(codes, o * row_bytes, part, x, ends, group_of, zero, scale)
