"""The product of one row of x with one row of OPTQ's codes, in registers: see :mod:`modulora_optq.cpu_one_row`, which is made of them.

Sixteen bytes hold codes of ⌈8 / bits⌉ times sixteen columns, at the same bits (:mod:`modulora_optq.packing`). They are loaded once, and
each part of them is shifted down, looked up in a register, or converted, and multiplied by its x. Where a part comes to
its next group its sum is scaled and added to that of the row.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from modulora_core.kernels import jit
from modulora_core.kernels.vectors import (
    LANES,
    has,
    lookup,
    loops,
    matrix,
    multiply_add,
    pointer,
    splat,
    sum_of_lanes,
    zeros,
)

_SUMS = 4  # a multiplier waits for its own result: so many sums are made side by side

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
    halves, shifts = [], []
    for first in (0, LANES // 2):
        at = builder.add(j, _INDEX(first))
        beyond = builder.icmp_signed(">=", at, part)
        byte = builder.select(beyond, builder.sub(at, part), at)
        source = builder.bitcast(builder.gep(plane, [byte]), _HALF.as_pointer())
        halves.append(builder.load(source, align=1))
        shifts.append(splat(builder, builder.zext(beyond, _WHOLE), ir.VectorType(_WHOLE, LANES // 2)))
    both = _lanes(range(LANES))
    return builder.lshr(
        builder.zext(builder.shuffle_vector(*halves, both), _WHOLES), builder.shuffle_vector(*shifts, both)
    )


@register_jitable
def parts_of_byte(bits: int) -> int:
    """How many codes' low bits a byte holds."""
    return 8 // (2 if bits == 3 else bits)


def _index(builder: Any, bits: int, low_bits: Any, high_bits: Any, p: int) -> Any:
    """The codes of part ``p``; there may be others above, which the caller doesn't look at."""
    shifted = builder.lshr(low_bits, _same((2 if bits == 3 else bits) * p))
    if bits != 3:
        return shifted
    above = builder.lshr(high_bits, _same(2 * p - 2)) if p else builder.shl(high_bits, _same(2))
    return builder.or_(builder.and_(shifted, _same(3)), builder.and_(above, _same(~3)))


def _steps(context: Any, builder: Any, bits: int, low_bits: Any, high_bits: Any, p: int) -> Any:
    """How far the sixteen codes of part ``p`` are from the middle one, as floats."""
    index = _index(builder, bits, low_bits, high_bits, p)
    # where it is one instruction: AVX2's is of eight values
    looks_up = (bits < 8 and has(context, "avx512f")) or (bits < 4 and has(context, "avx2"))
    if looks_up:
        table = ir.Constant(_FLOATS, [i % 2**bits - _middle(bits) for i in range(LANES)])
        return lookup(context, builder, table, index)
    codes = index if bits == 8 else builder.and_(index, _same(2**bits - 1))
    return builder.sitofp(builder.sub(codes, _same(_middle(bits))), _FLOATS)


def _middle(bits: int) -> int:
    """The code that stands for zero in a symmetric weight."""
    return 1 << (bits - 1)


def _row_product(bits: int) -> Any:
    """The intrinsic for a width."""
    parts = parts_of_byte(bits)

    @intrinsic
    def row_product(
        _context: Any, packed: Any, _row: Any, _part: Any, x: Any, ends: Any, groups: Any, scales: Any, _r: Any
    ) -> Any:  # fmt: skip
        """Of the row that begins at ``packed[row]``, as if its zeros were the middle code.

        Its low bits' parts are ``part`` bytes long, a multiple of sixteen. ``ends`` and ``groups`` are those of :func:`runs_of_groups`;
        ``scales`` are fp32 ``[groups, rows]``, of which this one is number ``r``.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, row, part, x, ends, groups, scales, r = arguments
            kinds = signature.args

            def number(kind: int, array: Any, index: Any, of: Any) -> Any:
                return builder.load(pointer(context, builder, kinds[kind], array, index, of))

            def add_products(j: Any, sums: list[Any]) -> None:
                source = builder.bitcast(builder.gep(data, [j]), _BYTES.as_pointer())
                low_bits = builder.zext(builder.load(source, align=1), _WHOLES)
                high_bits = _high_bits(builder, high, j, half) if bits == 3 else None
                for p, total in enumerate(sums):
                    column = builder.add(j, builder.mul(part, _INDEX(p)))
                    values = builder.load(pointer(context, builder, kinds[3], x, column, _FLOATS), align=4)
                    multiply_add(
                        builder, total, _steps(context, builder, bits, low_bits, high_bits, p), values
                    )

            data = pointer(context, builder, kinds[0], packed, row, ir.IntType(8))
            of_group, step = matrix(context, builder, kinds[6], scales)
            high, half = builder.gep(data, [part]), builder.sdiv(part, _INDEX(2))
            # of so many vectors; where registers are short, a vector is four of them
            at_once = max(1, _SUMS // parts) if has(context, "avx") else 1
            totals = zeros(builder, parts)
            begin = cgutils.alloca_once(builder, _INDEX)
            builder.store(_INDEX(0), begin)
            with cgutils.for_range(builder, matrix(context, builder, kinds[4], ends)[1]) as run:
                sums = [zeros(builder, parts) for _ in range(at_once)]
                first, end = builder.load(begin), builder.sext(number(4, ends, run.index, _WHOLE), _INDEX)
                builder.store(end, begin)
                vectors = builder.sdiv(builder.sub(end, first), _INDEX(LANES))
                for width, vector in loops(builder, vectors, at_once):
                    for k in range(width):
                        j = builder.mul(builder.add(vector, _INDEX(k)), _INDEX(LANES))
                        add_products(builder.add(first, j), sums[k])
                for p, total in enumerate(totals):
                    at = builder.add(builder.mul(run.index, _INDEX(parts)), _INDEX(p))
                    group = builder.sext(number(5, groups, at, _WHOLE), _INDEX)
                    place = builder.add(builder.mul(group, step), r)
                    scale = splat(builder, builder.load(builder.gep(of_group, [place])), _FLOATS)
                    of_run = functools.reduce(builder.fadd, [builder.load(of[p]) for of in sums])
                    multiply_add(builder, total, of_run, scale)
            return sum_of_lanes(builder, functools.reduce(builder.fadd, [builder.load(t) for t in totals]))

        i64 = types.int64
        return types.float32(packed, i64, i64, x, ends, groups, scales, i64), generate

    return row_product


product_2, product_3, product_4, product_8 = (_row_product(bits) for bits in (2, 3, 4, 8))


@jit()
def runs_of_groups(part: int, parts: int, group: int) -> Any:
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
