"""Products of one row of x with sixteen rows of OPTQ's codes, in registers: see :mod:`modulora_optq.cpu_one_row`, which is made of them.

Sixteen bytes hold codes of ⌈8 / bits⌉ times sixteen columns, at the same bits (:mod:`modulora_optq.packing`). They are loaded once, and
each part of them is shifted down, looked up in a register, or converted, and multiplied by its x. Before a part comes to
its next group its sums are scaled and added to those of the row. The columns in between, a *run*, are multiplied by all rows
before the next ones: where they are, and whose scales they take, is found once.
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
from modulora_core.kernels.prefetch import FAR, ask_for
from modulora_core.kernels.vectors import (
    LANES,
    has,
    lookup,
    loops,
    multiply_add,
    pointer,
    splat,
    sum_of_lanes,
    zeros,
)

_SUMS = 4  # a multiplier waits for its own result: so many sums are made side by side

_INDEX, _WHOLE, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_WHOLES = ir.VectorType(_WHOLE, LANES)
_FLOATS = ir.VectorType(_FLOAT, LANES)


def _same(value: int) -> Any:
    return ir.Constant(_WHOLES, [value] * LANES)


def _high_bytes(builder: Any, plane: Any, j: Any, part: Any) -> Any:
    """Of the plane of one bit a code sixteen bytes, whose bit 2 p belongs to part p of the low bits at ``j``; others are of no meaning.

    The plane has eight parts of ``part`` bytes, half as long as those of the low bits. An odd one may begin after eight of the columns, so
    they are loaded by eights. From an odd one's byte another's bit comes to the next byte's highest, which isn't looked at.
    """
    words = ir.Constant(ir.VectorType(_INDEX, 2), ir.Undefined)
    for half in range(2):
        at = builder.add(j, _INDEX(half * LANES // 2))
        beyond = builder.icmp_signed(">=", at, part)
        byte = builder.select(beyond, builder.sub(at, part), at)
        source = builder.bitcast(builder.gep(plane, [byte]), _INDEX.as_pointer())
        word = builder.lshr(builder.load(source, align=1), builder.zext(beyond, _INDEX))
        words = builder.insert_element(words, word, _WHOLE(half))
    return builder.bitcast(words, _BYTES)


@register_jitable
def parts_of_byte(bits: int) -> int:
    """How many codes' low bits a byte holds."""
    return 8 // (2 if bits == 3 else bits)


def _steps(context: Any, builder: Any, bits: int, low_bits: Any, high_bytes: Any) -> list[Any]:
    """How far the sixteen codes of each part are from the middle one, as floats."""
    if bits != 3:
        return [
            _step(context, builder, bits, builder.lshr(low_bits, _same(bits * p)))
            for p in range(parts_of_byte(bits))
        ]
    if has(context, "avx512bw"):
        return _steps_by_masks(context, builder, low_bits, high_bytes)
    high_bits = builder.zext(high_bytes, _WHOLES)
    steps = []
    for p in range(parts_of_byte(bits)):
        low = builder.and_(builder.lshr(low_bits, _same(2 * p)), _same(3))
        above = builder.lshr(high_bits, _same(2 * p - 2)) if p else builder.shl(high_bits, _same(2))
        steps.append(_step(context, builder, bits, builder.or_(low, builder.and_(above, _same(~3)))))
    return steps


def _step(context: Any, builder: Any, bits: int, index: Any) -> Any:
    """How far codes are from the middle one; above their bits there may be others."""
    # where it is one instruction: AVX2's is of eight values
    looks_up = (bits < 8 and has(context, "avx512f")) or (bits < 4 and has(context, "avx2"))
    if looks_up:
        table = ir.Constant(_FLOATS, [i % 2**bits - _middle(bits) for i in range(LANES)])
        return lookup(context, builder, table, index)
    codes = index if bits == 8 else builder.and_(index, _same(2**bits - 1))
    return builder.sitofp(builder.sub(codes, _same(_middle(bits))), _FLOATS)


def _steps_by_masks(context: Any, builder: Any, low_bits: Any, high_bytes: Any) -> list[Any]:
    """The same at 3 bits where sums take a mask, which a comparison makes: low bits are looked up, and 4 is taken off where no high is."""
    table = ir.Constant(_FLOATS, [float(i % 4) for i in range(LANES)])
    less, none = ir.Constant(_FLOATS, [-4.0] * LANES), ir.Constant(_BYTES, [0] * LANES)
    steps = []
    for p in range(parts_of_byte(3)):
        low = lookup(context, builder, table, builder.lshr(low_bits, _same(2 * p)))
        bit = builder.and_(high_bytes, ir.Constant(_BYTES, [1 << 2 * p] * LANES))
        steps.append(builder.select(builder.icmp_unsigned("==", bit, none), builder.fadd(low, less), low))
    return steps


def _middle(bits: int) -> int:
    """The code that stands for zero in a symmetric weight."""
    return 1 << (bits - 1)


def _run(bits: int) -> Any:
    """The intrinsic for a width."""
    parts = parts_of_byte(bits)

    @intrinsic
    def add_run(  # numba's types of the arguments, of which those of numbers are not read
        _context: Any, packed: Any, _first: Any, _row_bytes: Any, _rows: Any, _part: Any, _start: Any, _end: Any, x: Any, groups: Any,
        _run: Any, scales: Any, totals: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, first, row_bytes, rows, part, start, end, x, groups, run, scales, totals = arguments
            kinds = signature.args

            def column(p: int, j: Any) -> Any:
                at = builder.add(j, builder.mul(part, _INDEX(p)))
                return builder.load(pointer(context, builder, kinds[7], x, at, _FLOATS), align=4)

            def steps(data: Any, j: Any) -> list[Any]:
                source = builder.bitcast(builder.gep(data, [j]), _BYTES.as_pointer())
                low_bits = builder.zext(builder.load(source, align=1), _WHOLES)
                plane, half = builder.gep(data, [part]), builder.sdiv(part, _INDEX(2))
                high = _high_bytes(builder, plane, j, half) if bits == 3 else None
                return _steps(context, builder, bits, low_bits, high)

            of_parts = []  # of each part the scales of its group, a row at a time
            for p in range(parts):
                at = builder.add(builder.mul(run, _INDEX(parts)), _INDEX(p))
                group = builder.load(pointer(context, builder, kinds[8], groups, at, _WHOLE))
                at = builder.mul(builder.sext(group, _INDEX), _INDEX(LANES))
                of_parts.append(pointer(context, builder, kinds[10], scales, at, _FLOAT))
            # of so many vectors; where registers are short, a vector is four of them
            at_once = max(1, _SUMS // parts) if has(context, "avx") else 1
            vectors = builder.sub(builder.sdiv(builder.sub(end, start), _INDEX(LANES)), _INDEX(1))
            data = pointer(context, builder, kinds[0], packed, first, ir.IntType(8))
            ahead = builder.mul(row_bytes, _INDEX(LANES))
            high_start = builder.add(part, builder.sdiv(start, _INDEX(2)))
            with cgutils.for_range(builder, rows) as loop:
                row = builder.gep(data, [builder.mul(loop.index, row_bytes)])
                # where the next sixteen rows have what these have here
                ask_for(builder, builder.gep(row, [builder.add(ahead, start)]), FAR)
                if bits == 3:
                    ask_for(builder, builder.gep(row, [builder.add(ahead, high_start)]), FAR)
                sums = [zeros(builder, parts) for _ in range(at_once)]
                # many runs are one vector: not in a loop, so that nothing but its row is computed for each row
                for p, value in enumerate(steps(row, start)):
                    builder.store(builder.fmul(value, column(p, start), flags=("contract",)), sums[0][p])
                for width, vector in loops(builder, vectors, at_once):
                    for k in range(width):
                        more = builder.mul(builder.add(vector, _INDEX(k + 1)), _INDEX(LANES))
                        j = builder.add(start, more)
                        for p, value in enumerate(steps(row, j)):
                            multiply_add(builder, sums[k][p], value, column(p, j))
                at = builder.mul(loop.index, _INDEX(LANES))
                total = pointer(context, builder, kinds[11], totals, at, _FLOATS)
                added = builder.load(total, align=4)
                for p, of_part in enumerate(of_parts):
                    scale = splat(builder, builder.load(builder.gep(of_part, [loop.index])), _FLOATS)
                    of_run = functools.reduce(builder.fadd, [builder.load(of[p]) for of in sums])
                    product = builder.fmul(of_run, scale, flags=("contract",))
                    added = builder.fadd(added, product, flags=("contract",))
                builder.store(added, total, align=4)
            return context.get_dummy_value()

        i64 = types.int64
        return (
            types.void(packed, i64, i64, i64, i64, i64, i64, x, groups, i64, scales, totals),
            generate,
        )

    return add_run


add_run_2, add_run_3, add_run_4, add_run_8 = (_run(bits) for bits in (2, 3, 4, 8))
"""``(packed, first, row_bytes, rows, part, start, end, x, groups, run, scales, totals)``: for so many rows, sixteen at most, the
first of which begins at ``packed[first]``, add to ``totals[r]`` the products of the codes in bytes ``[start, end)`` of all parts, as if
zeros were the middle code. Parts of the low bits are ``part`` bytes long, a multiple of sixteen, as are ``start`` and ``end``: those of
run number ``run`` of :func:`runs_of_groups`, which gives ``groups``. ``scales`` are fp32 ``[groups, 16]``, and ``totals`` fp32
``[16, 16]``: sums by lane."""


@intrinsic
def sum_of(_context: Any, totals: Any, _r: Any) -> Any:
    """The sum of ``totals[r]``, of sixteen lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, r = arguments
        at = builder.mul(r, _INDEX(LANES))
        place = pointer(context, builder, signature.args[0], totals, at, _FLOATS)
        return sum_of_lanes(builder, builder.load(place, align=4))

    return types.float32(totals, types.int64), generate


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
