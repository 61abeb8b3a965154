"""Scales and zeros of some rows of an OPTQ weight, for the product of one row of x: see :mod:`modulora_optq.cpu_one_row`.

Sixteen groups of a row are taken at once, a *chunk*. Their scales lie side by side. Their zeros lie as codes do
(:mod:`modulora_optq.packing`), side by side too but at several places of the same bytes, so a chunk's zeros are looked up: sixteen bytes
are loaded, and a table, the same for all rows, says from which of them and at which bit each group takes its own. A chunk is shorter where
its zeros don't lie within sixteen bytes.

What it moves and does, for a row of G groups: 2 G bytes of scales and bits · G / 8 of zeros are read, and some fifteen operations are done
for each sixteen groups, five more at 3 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from modulora_core.kernels.cpu.ir import (
    LANES,
    halves_to_floats,
    lookup,
    loops,
    matrix,
    pointer,
    sum_of_lanes,
)
from modulora_core.kernels.cpu.ir import (
    zeros as zeros_of,
)
from modulora_optq.packing import PLANES, plane_bytes

_INDEX, _WHOLE = ir.IntType(64), ir.IntType(32)
_BYTES, _HALVES, _WHOLES, _FLOATS = (
    ir.VectorType(of, LANES) for of in (ir.IntType(8), ir.IntType(16), _WHOLE, ir.FloatType())
)
_STARTS, _COUNTED, _PLACES = 0, 1, 2  # of a chunk in a table: see chunks_of()
_FIELDS = 6


def chunks_of(bits: int, groups: int) -> NDArray[np.int32]:
    """Where a row of so many groups, at least one, has their scales and zeros of ``bits`` bits: int32 ``[chunks, 6, 16]``.

    Of each chunk the first three numbers are its first group and the bytes of the row's zeros from which on low bits, and third ones, are
    looked up; then, of each group, -1, and 0 where there is none; of the low bits the byte after that, and the bit in it; and of the third
    one at 3 bits.
    """
    planes, begin = [], 0
    for width in PLANES[bits]:
        planes.append((begin, plane_bytes(groups, width), width))
        begin += plane_bytes(groups, width)
    chunks: list[list[int]] = []
    for g in range(groups):
        if not chunks or not _is_chunk([*chunks[-1], g], planes):
            chunks.append([])
        chunks[-1].append(g)
    table = np.zeros((len(chunks), _FIELDS, LANES), np.int32)
    for of_chunk, members in zip(table, chunks, strict=True):
        of_chunk[_STARTS, 0], of_chunk[_COUNTED, : len(members)] = members[0], -1
        for number, (begin, part, plane_width) in enumerate(planes):
            at, field = [begin + g % part for g in members], _PLACES + 2 * number
            of_chunk[_STARTS, 1 + number] = min(at)
            of_chunk[field, : len(members)] = np.array(at) - min(at)
            of_chunk[field + 1, : len(members)] = [g // part * plane_width for g in members]
    return table


def _is_chunk(members: list[int], planes: list[tuple[int, int, int]]) -> bool:
    """Whether so many groups can be taken at once."""
    at = [[g % part for g in members] for _, part, _ in planes]
    return len(members) <= LANES and all(max(places) - min(places) < LANES for places in at)


@intrinsic
def sum_of_vectors(_context: Any, x: Any, _first: Any, _count: Any) -> Any:
    """``Σ x[first : first + count]``, flat; ``count`` is a multiple of sixteen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, first, count = arguments
        sums = zeros_of(builder, 2)
        for width, vector in loops(builder, builder.sdiv(count, _INDEX(LANES)), len(sums)):
            for k in range(width):
                at = builder.add(first, builder.mul(builder.add(vector, _INDEX(k)), _INDEX(LANES)))
                more = builder.load(
                    pointer(context, builder, signature.args[0], x, at, _FLOATS), align=4
                )
                builder.store(builder.fadd(builder.load(sums[k]), more), sums[k])
        return sum_of_lanes(builder, builder.fadd(*map(builder.load, sums)))

    return types.float32(x, types.int64, types.int64), generate


def take_row(bits: int) -> Any:
    """The intrinsic for a width.

    ``(scales, first, zeros, zero, chunks, sums_of_x, taken, sums, r)`` writes the scales of a row to ``taken[r]``, and by lane what its
    zeros take off, ``−Σ scale (zero − middle) Σ x``, to ``sums[r]``. ``scales`` are the bits of fp16 and ``zeros`` bytes, both flat; the
    row's begin at ``scales[first]`` and ``zeros[zero]``, and sixteen are read at once, also behind the last ones. ``chunks`` are of
    :func:`chunks_of`, ``sums_of_x`` fp32 ``[groups + 15 or more]``, ``taken`` fp32 ``[rows, groups + 15 or more]``, ``sums`` fp32 ``[rows,
    16]``. Where ``zeros`` is empty the weight is symmetric.
    """

    @intrinsic
    def take(
        _context: Any, scales: Any, _first: Any, zeros: Any, _zero: Any, chunks: Any, sums_of_x: Any, taken: Any, sums: Any, _r: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            scales, first, zeros, zero, chunks, sums_of_x, taken, sums, r = arguments
            kinds = signature.args
            count = cgutils.unpack_tuple(
                builder, context.make_array(kinds[4])(context, builder, chunks).shape, 3
            )[0]
            size = cgutils.unpack_tuple(
                builder, context.make_array(kinds[2])(context, builder, zeros).shape, 1
            )[0]
            width = matrix(context, builder, kinds[6], taken)[1]
            (total,) = zeros_of(builder, 1)
            with cgutils.for_range(builder, count) as loop:
                at = builder.mul(loop.index, _INDEX(_FIELDS * LANES))
                table = pointer(context, builder, kinds[4], chunks, at, _WHOLES)
                starts = builder.bitcast(table, _WHOLE.as_pointer())
                g, *planes = (
                    builder.sext(builder.load(builder.gep(starts, [_INDEX(i)])), _INDEX)
                    for i in range(3)
                )
                halves = pointer(context, builder, kinds[0], scales, builder.add(first, g), _HALVES)
                scale = halves_to_floats(context, builder, builder.load(halves, align=2))
                to = builder.add(builder.mul(r, width), g)
                builder.store(
                    scale, pointer(context, builder, kinds[6], taken, to, _FLOATS), align=4
                )
                with builder.if_then(builder.icmp_signed(">", size, _INDEX(0))):
                    places = [
                        pointer(context, builder, kinds[2], zeros, builder.add(zero, plane), _BYTES)
                        for plane in planes
                    ]
                    steps = _steps(context, builder, bits, places, table)
                    of_x = pointer(context, builder, kinds[5], sums_of_x, g, _WHOLES)
                    counted = builder.load(builder.gep(table, [_INDEX(_COUNTED)]), align=4)
                    factor = builder.bitcast(
                        builder.and_(builder.load(of_x, align=4), counted), _FLOATS
                    )
                    off = builder.fmul(builder.fmul(steps, factor), scale)
                    builder.store(builder.fsub(builder.load(total), off), total)
            target = pointer(
                context, builder, kinds[7], sums, builder.mul(r, _INDEX(LANES)), _FLOATS
            )
            builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(scales, i64, zeros, i64, chunks, sums_of_x, taken, sums, i64), generate

    return take


def _steps(context: Any, builder: Any, bits: int, places: list[Any], table: Any) -> Any:
    """How far the zeros of a chunk are from the middle code, as floats; ``places`` are the bytes of low bits and of third ones."""

    def plane(number: int, width: int) -> Any:
        at, bit = (
            builder.load(builder.gep(table, [_INDEX(_PLACES + 2 * number + i)]), align=4)
            for i in range(2)
        )
        words = builder.bitcast(
            builder.zext(builder.load(places[number], align=1), _WHOLES), _FLOATS
        )
        found = builder.bitcast(lookup(context, builder, words, at), _WHOLES)
        return builder.and_(builder.lshr(found, bit), ir.Constant(_WHOLES, [2**width - 1] * LANES))

    codes = plane(0, 2 if bits == 3 else bits)
    if bits == 3:
        codes = builder.or_(codes, builder.shl(plane(1, 1), ir.Constant(_WHOLES, [2] * LANES)))
    return builder.sitofp(
        builder.sub(codes, ir.Constant(_WHOLES, [1 << (bits - 1)] * LANES)), _FLOATS
    )
