"""How the CPU decodes OPTQ's packed weights, compiled by numba: the values of the reference at the speed of memory.

In all kernels ``codes`` are the bytes of all rows, flat, as :mod:`modulora_optq.packing` arranges them; ``zeros`` likewise, or empty
for a symmetric weight; ``scales`` are the bits of fp16 ``[out, groups]``, int16; ``group`` stored columns share a scale and a zero.
A row is cut where a group ends, and where a part of a plane does: between two cuts all codes are at the same bits of neighbouring
bytes and share a scale. They are shifted down, and looked up among the values that codes of up to 4 bits can have, or computed; nothing
but values is written. Where parts consist of whole groups, as in most layers, what is left of a row is one loop. Where codes are, and how
they are taken, is in :mod:`modulora_optq.cpu_planes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import from_half, narrow, on_stack, read_ahead
from modulora_core.kernels.cpu.ir import (
    LANES,
    Table,
    chosen,
    halves_to_floats,
    pointer,
    put_numbers,
    splat,
)
from modulora_optq.cpu_planes import (
    Taken,
    code_at,
    left_of,
    looks_up,
    moved,
    parts_of,
    place_of,
    unpack,
)
from modulora_optq.packing import PLANES

_RUN = 64  # codes that are taken at once: a group of most weights, or a part of one
_PIECE = 4096  # columns whose zeros are unpacked at once

_BYTE, _HALF, _WHOLE, _INDEX = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)

_room = on_stack(_PIECE + 1 + LANES, np.uint8)
"""For the zeros of a piece's groups, which may be as many as its columns and one more, and what :func:`unpack` writes after them."""


def _values(builder: Any, codes: Any, of_group: tuple[Any, Any]) -> Any:
    """Of codes as floats; ``of_group``: zero and scale."""
    zero, scale = (splat(builder, number, codes.type) for number in of_group)
    return builder.fmul(builder.fsub(codes, zero), scale)


def _table(
    context: Any, builder: Any, bits: int, kind: Any, of_group: tuple[Any, Any]
) -> Table | None:
    """The values that a group's codes can have, for an array of that type; None where to compute them takes no longer."""
    if not looks_up(context, bits):
        return None
    # a vector of eight, where that many are enough, is what LLVM sees to be both halves of the table
    count = LANES // 2 if bits < 4 else LANES
    possible = ir.Constant(
        ir.VectorType(ir.FloatType(), count), [float(k % 2**bits) for k in range(count)]
    )
    values = _values(builder, possible, of_group)
    return Table(
        context, builder, kind, chosen(builder, values, [lane % count for lane in range(LANES)])
    )


def _put(
    context: Any, builder: Any, bits: int, taken: Taken, size: int, of_group: tuple[Any, Any], out: tuple[Any, Any]
) -> Callable[[Any, Any], None]:  # fmt: skip
    """Generates, at each call, ``put(k, to)``: the values of ``size`` codes from the k-th on to ``out[to:]``."""
    table = _table(context, builder, bits, out[0], of_group)

    def put(k: Any, to: Any) -> None:
        at_once = min(size, table.at_once * LANES) if table else LANES
        # without a lookup two planes are joined as bytes, of which registers hold more
        lane = table.index if table else _BYTE if bits == 3 else _WHOLE
        of, computed = ir.VectorType(lane, at_once), []
        for first in range(0, size, at_once):
            at = builder.add(k, _INDEX(first))
            if table:
                table.put(out[1], builder.add(to, _INDEX(first)), taken.indices(at, of))
            else:
                computed.append(
                    _values(builder, builder.uitofp(taken.codes(at, of), _FLOATS), of_group)
                )
        put_numbers(context, builder, *out, to, computed)

    return put


def _take(size: int) -> Any:
    """The intrinsic that takes ``size`` codes in each turn, sixteen or a multiple of 32.

    ``(codes, row, parts, place, bits, zeros, g, scales, first, out, to, turns, groups)`` writes ``(code - zeros[g]) * scales[first]`` to
    ``out[to:]`` for so many turns of the group ``g``; then, of ``groups`` groups, for as many of the next one. The row's codes begin at
    ``codes[row]``. ``parts`` are the lengths of parts of the low bits and of third ones; both are multiples of what is taken of a group,
    where ``groups`` is more than one.
    """

    @intrinsic
    def take(
        _context: Any, codes: Any, _row: Any, parts: Any, place: Any, _bits: Any, zeros: Any, _g: Any, scales: Any, _first: Any,
        out: Any, _to: Any, _turns: Any, _groups: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            for bits in PLANES:
                with builder.if_then(builder.icmp_signed("==", arguments[4], _INDEX(bits))):
                    _take_groups(context, builder, bits, size, signature.args, arguments)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(
            codes, i64, parts, place, i64, zeros, i64, scales, i64, out, i64, i64, i64
        ), generate

    return take


def _take_groups(
    context: Any, builder: Any, bits: int, size: int, kinds: Any, arguments: Any
) -> None:
    """What :func:`_take` generates for a width."""
    codes, row, parts, place, _, zeros, g, scales, first, out, to, turns, groups = arguments
    lengths = cgutils.unpack_tuple(builder, parts, 2)
    moving = [cgutils.alloca_once(builder, _INDEX) for _ in range(4)]
    for variable, value in zip(moving, cgutils.unpack_tuple(builder, place, 4), strict=True):
        builder.store(value, variable)
    of_turns = builder.mul(turns, _INDEX(size))
    with cgutils.for_range(builder, groups) as loop:
        zero, scale = (
            builder.load(pointer(context, builder, kind, array, builder.add(at, loop.index), of))
            for kind, array, at, of in (
                (kinds[5], zeros, g, _BYTE),
                (kinds[7], scales, first, _HALF),
            )
        )
        of_group = builder.uitofp(zero, ir.FloatType()), halves_to_floats(context, builder, scale)
        here = [builder.load(variable) for variable in moving]
        taken = Taken(context, builder, bits, (kinds[0], codes), row, lengths[0], here)
        put = _put(context, builder, bits, taken, size, of_group, (kinds[9], out))
        begin = builder.add(to, builder.mul(loop.index, of_turns))
        with cgutils.for_range(builder, turns) as turn:
            k = builder.mul(turn.index, _INDEX(size))
            put(k, builder.add(begin, k))
        for at, shift, length, width in zip(
            moving[::2], moving[1::2], lengths, PLANES[bits], strict=False
        ):
            then = builder.add(builder.load(at), of_turns)
            is_next = builder.icmp_signed("==", then, length)
            builder.store(builder.select(is_next, _INDEX(0), then), at)
            more = builder.select(is_next, _INDEX(width), _INDEX(0))
            builder.store(builder.add(builder.load(shift), more), shift)


_take_runs, _take_vector = _take(_RUN), _take(LANES)


@jit(borrows=True)
def _decode_row(
    codes: Any, row: int, bits: int, group: int, parts: Any, start: int, begin: Any, zeros: Any, scales: Any, first: int, out: Any
) -> None:  # fmt: skip
    """Columns ``start ...`` of the row that begins at ``codes[row]`` to all of ``out``.

    ``zeros[0]`` and ``scales[first]`` are of the first column's group. ``begin``: its place, how many columns after it the group ends, and
    whether parts consist of whole groups.
    """
    place, end, consist_of_groups = begin
    k, g = 0, 0
    while k < out.size:
        left = min(out.size - k, left_of(place, parts))
        if end - k == group and group <= left and group % _RUN == 0:
            groups = (out.size - k if consist_of_groups else left) // group
            turns, take = group // _RUN, groups * group
            _take_runs(
                codes, row, parts, place, bits, zeros, g, scales, first + g, out, k, turns, groups
            )
            g, k, end = g + groups, k + take, end + take
            place = (
                moved(place, take, parts, bits)
                if take <= left
                else place_of(start + k, parts, bits)
            )
            continue
        take = min(left, end - k)
        _take_runs(
            codes, row, parts, place, bits, zeros, g, scales, first + g, out, k, take // _RUN, 1
        )
        done = take // _RUN * _RUN
        if done < take:
            then = place[0] + done, place[1], place[2] + done, place[3]
            turns = (take - done) // LANES
            _take_vector(
                codes, row, parts, then, bits, zeros, g, scales, first + g, out, k + done, turns, 1
            )
            done += turns * LANES
        if done < take:
            zero, scale = np.float32(zeros[g]), from_half(scales[first + g])
            for j in range(done, take):
                code = np.float32(code_at(codes, row, parts[0], place, j, bits))
                out[k + j] = narrow((code - zero) * scale, out[k + j])
        place, k = moved(place, take, parts, bits), k + take
        if k == end:
            g, end = g + 1, end + group


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Stored columns ``start ...`` of the rows from ``row`` on: see :class:`modulora_core.kernels.cpu.products.RowKernels`.

    ``weight`` is codes, scales, zeros, bits, columns of a group, and those of a row. What is the same in each row is divided once
    (docs/performance-findings.md).
    """
    codes, scales, zeros, bits, group, n = weight
    rows, groups = max(1, len(scales)), scales.shape[1]
    row_bytes, zero_bytes = codes.size // rows, zeros.size // rows
    flat, room = scales.reshape(scales.size), _room()
    parts, zero_parts = parts_of(n, bits), parts_of(groups, bits)
    consist_of_groups = parts[0] % group == 0 and parts[1] % group == 0
    for at in range(0, columns, _PIECE):
        piece, count = start + at, min(_PIECE, columns - at)
        first = piece // group
        of_groups = (piece + count - 1) // group + 1 - first
        begin = place_of(piece, parts, bits), (first + 1) * group - piece, consist_of_groups
        zero_place = place_of(first, zero_parts, bits)
        if not zero_bytes:
            room[:of_groups] = 1 << (bits - 1)
        # its parts are all over the row: as much as it is of the row, so that all of it is asked for once
        ahead, asked = row_bytes * piece // n, row_bytes * count // n
        for r in range(len(out)):
            o, to = row + r, out[r, at : at + count]
            read_ahead(codes, o * row_bytes + ahead, asked)
            if zero_bytes:
                unpack(zeros, o * zero_bytes, bits, zero_parts, zero_place, of_groups, room)
            o_codes, o_first = o * row_bytes, o * groups + first
            _decode_row(codes, o_codes, bits, group, parts, piece, begin, room, flat, o_first, to)
