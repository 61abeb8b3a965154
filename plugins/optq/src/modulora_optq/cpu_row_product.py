"""The product of one row of x with one row of OPTQ's codes, in registers: see :mod:`modulora_optq.cpu_one_row`, which is made of it.

Sixteen bytes hold codes of ⌈8 / bits⌉ times sixteen columns, at the same bits (:mod:`modulora_optq.packing`). They are loaded once, and
each part of them is shifted down, looked up in a register, or converted, and multiplied by its x. After a *step* of four such vectors, or
fewer where a part comes to its next group sooner, each part's sum is scaled and added to that of the row.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels.cpu.ir import (
    AHEAD,
    LANES,
    NEAR,
    ask_for,
    has,
    lookup,
    matrix,
    multiply_add,
    pointer,
    splat,
    sum_of_lanes,
    zeros,
)
from modulora_optq.cpu_planes import looks_up

_ROWS = 2  # of the weight, that share what is loaded of x

_BYTE, _INDEX, _WHOLE, _FLOAT = ir.IntType(8), ir.IntType(64), ir.IntType(32), ir.FloatType()
_BYTES = ir.VectorType(_BYTE, LANES)
_WHOLES = ir.VectorType(_WHOLE, LANES)
_FLOATS = ir.VectorType(_FLOAT, LANES)


def _same(value: int) -> Any:
    return ir.Constant(_WHOLES, [value] * LANES)


def parts_of_byte(bits: int) -> int:
    """How many codes' low bits a byte holds."""
    return 8 // (2 if bits == 3 else bits)


def _high_bytes(builder: Any, plane: Any, j: Any, part: Any, at_once: int) -> Any:
    """Of the plane of one bit a code sixteen bytes, whose bit 2 p belongs to part p of the low bits at ``j``; others are of no meaning.

    The plane has eight parts of ``part`` bytes, half as long as those of the low bits. ``at_once`` are loaded: eight where an odd one may
    begin after eight of the columns, else sixteen. From an odd one's byte another's bit comes to the next byte's highest, which isn't
    looked at.
    """
    words = ir.Constant(ir.VectorType(ir.IntType(8 * at_once), LANES // at_once), ir.Undefined)
    for number in range(LANES // at_once):
        at = builder.add(j, _INDEX(number * at_once))
        beyond = builder.icmp_signed(">=", at, part)
        byte = builder.select(beyond, builder.sub(at, part), at)
        source = builder.bitcast(builder.gep(plane, [byte]), words.type.element.as_pointer())
        word = builder.load(source, align=1)
        words = builder.insert_element(
            words, builder.lshr(word, builder.zext(beyond, word.type)), _WHOLE(number)
        )
    return builder.bitcast(words, _BYTES)


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
        steps.append(
            _step(context, builder, bits, builder.or_(low, builder.and_(above, _same(~3))))
        )
    return steps


def _step(context: Any, builder: Any, bits: int, index: Any) -> Any:
    """How far codes are from the middle one; above their bits there may be others."""
    if looks_up(context, bits):
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
        steps.append(
            builder.select(builder.icmp_unsigned("==", bit, none), builder.fadd(low, less), low)
        )
    return steps


def _middle(bits: int) -> int:
    """The code that stands for zero in a symmetric weight."""
    return 1 << (bits - 1)


def rows_product(bits: int, vectors: int) -> Any:
    """The intrinsic for a width, and steps of so many vectors.

    ``(codes, first, row_bytes, count, part, x, group_of, scales, sums, y, o)`` writes ``y[o + r] = Σ sums[r] + Σ_k (code[k] − middle)
    scale[k's group] x[k]`` for ``count`` rows, at least one; the codes of row 0 begin at ``codes[first]``. Parts of the low bits are
    ``part`` bytes long, a multiple of a step's. ``x`` is fp32 ``[1, in]``, ``group_of`` int32 ``[steps, parts]``, ``scales`` fp32 ``[rows,
    groups or more]``, ``sums`` fp32 ``[rows, 16]``, ``y`` fp32 ``[1, out]``.
    """
    parts, step = parts_of_byte(bits), vectors * LANES

    @intrinsic
    def product(  # numba's types of the arguments, of which those of numbers are not read
        _context: Any, codes: Any, _first: Any, _row_bytes: Any, _count: Any, _part: Any, x: Any, group_of: Any, scales: Any, sums: Any,
        y: Any, _o: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, first, row_bytes, count, part, x, group_of, scales, sums, y, o = arguments
            kinds = signature.args
            columns = [
                pointer(context, builder, kinds[5], x, builder.mul(part, _INDEX(p)), _FLOAT)
                for p in range(parts)
            ]
            groups = pointer(context, builder, kinds[6], group_of, _INDEX(0), _WHOLE)
            width = matrix(context, builder, kinds[7], scales)[1]
            at_once = _ROWS if has(context, "avx512f") else 1
            turns = builder.sdiv(builder.add(count, _INDEX(at_once - 1)), _INDEX(at_once))
            last = builder.sub(count, _INDEX(1))
            with cgutils.for_range(builder, turns) as turn:
                rows = [builder.mul(turn.index, _INDEX(at_once))]
                for _ in range(at_once - 1):  # the last row may be computed twice
                    more = builder.add(rows[-1], _INDEX(1))
                    rows.append(builder.select(builder.icmp_signed("<", more, last), more, last))
                data = [
                    pointer(
                        context,
                        builder,
                        kinds[0],
                        codes,
                        builder.add(first, builder.mul(r, row_bytes)),
                        _BYTE,
                    )
                    for r in rows
                ]
                scale = [
                    pointer(context, builder, kinds[7], scales, builder.mul(r, width), _FLOAT)
                    for r in rows
                ]
                # an addition waits for the one before: each part has a sum of its own, where there are registers for them
                totals = [zeros(builder, parts if has(context, "avx512f") else 1) for _ in rows]
                for r, of_row in zip(rows, totals, strict=True):
                    begun = pointer(
                        context, builder, kinds[8], sums, builder.mul(r, _INDEX(LANES)), _FLOATS
                    )
                    builder.store(builder.load(begun, align=4), of_row[0])
                with cgutils.for_range(builder, builder.sdiv(part, _INDEX(step))) as loop:
                    start = builder.mul(loop.index, _INDEX(step))
                    of_rows = _of_step(
                        context, builder, (bits, vectors), data, part, columns, start
                    )
                    for p in range(parts):
                        place = builder.add(builder.mul(loop.index, _INDEX(parts)), _INDEX(p))
                        group = builder.sext(builder.load(builder.gep(groups, [place])), _INDEX)
                        for of_row, total, of_scale in zip(of_rows, totals, scale, strict=True):
                            factor = splat(
                                builder, builder.load(builder.gep(of_scale, [group])), _FLOATS
                            )
                            multiply_add(builder, total[p % len(total)], of_row[p], factor)
                for r, of_row in zip(rows, totals, strict=True):
                    total = sum_of_lanes(
                        builder, functools.reduce(builder.fadd, map(builder.load, of_row))
                    )
                    builder.store(
                        total, pointer(context, builder, kinds[9], y, builder.add(o, r), _FLOAT)
                    )
            return context.get_dummy_value()

        i64 = types.int64
        return (
            types.void(codes, i64, i64, i64, i64, x, group_of, scales, sums, y, i64),
            generate,
        )

    return product


def _of_step(
    context: Any,
    builder: Any,
    form: tuple[int, int],
    data: list[Any],
    part: Any,
    columns: list[Any],
    start: Any,
) -> list[list[Any]]:
    """Of each row and part the sum of its codes times x, by lane, of the vectors that begin ``start`` bytes after the row's ``data``.

    Args:
        form: bits and vectors.
        columns: of each part where its x are.
    """
    bits, vectors = form
    half = builder.sdiv(part, _INDEX(2))
    planes = [builder.gep(of_row, [part]) for of_row in data]
    for of_row, plane in zip(data, planes, strict=True):
        ask_for(builder, builder.gep(of_row, [builder.add(start, _INDEX(AHEAD))]), NEAR)
        if bits == 3:
            high = builder.add(builder.sdiv(start, _INDEX(2)), _INDEX(AHEAD))
            ask_for(builder, builder.gep(plane, [high]), NEAR)
    sums: list[list[Any]] = [[] for _ in data]
    for number in range(vectors):
        j = builder.add(start, _INDEX(number * LANES))
        at_once = LANES if vectors > 1 else LANES // 2
        places = [
            builder.bitcast(builder.gep(of_part, [j]), _FLOATS.as_pointer()) for of_part in columns
        ]
        values = [builder.load(place, align=4) for place in places]
        for of_row, plane, total in zip(data, planes, sums, strict=True):
            source = builder.bitcast(builder.gep(of_row, [j]), _BYTES.as_pointer())
            low_bits = builder.zext(builder.load(source, align=1), _WHOLES)
            high_bytes = _high_bytes(builder, plane, j, half, at_once) if bits == 3 else None
            steps = _steps(context, builder, bits, low_bits, high_bytes)
            products = [
                builder.fmul(a, b, flags=("contract",)) for a, b in zip(steps, values, strict=True)
            ]
            total[:] = (
                [
                    builder.fadd(a, b, flags=("contract",))
                    for a, b in zip(total, products, strict=True)
                ]
                if total
                else products
            )
    return sums
