"""How the CPU decodes OPTQ's packed weights, compiled by numba: the values of the reference at the speed of memory.

In all kernels ``codes`` are the bytes of all rows, flat, as :mod:`modulora_optq.packing` arranges them; ``zeros`` likewise, or empty
for a symmetric weight; ``scales`` are the bits of fp16 ``[out, groups]``, int16; ``group`` stored columns share a scale and a zero.
A row is decoded in two steps through a scratch in the L1 cache: from bits to bytes, where groups don't matter, and from bytes to
values, where the width doesn't. LLVM's own vectorised loops spend more on entering them than on a group of 64, so a step's vector
is spelled, in terms that any processor's instructions can be made from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.conversions import from_half, narrow, put_numbers
from modulora_core.kernels.prefetch import read_ahead
from modulora_core.kernels.scratch import on_stack
from modulora_core.kernels.tables import Table
from modulora_core.kernels.vectors import has, loops, pointer, splat

_BYTES = 64  # bytes that are unpacked at once
_VALUES = 16  # and values of a vector
_AT_ONCE = 4  # vectors that are computed at once
_PIECE = 4096  # columns that are unpacked before they are computed

_MANY_BYTES = ir.VectorType(ir.IntType(8), _BYTES)
_FEW_BYTES = ir.VectorType(ir.IntType(8), _VALUES)
_WHOLE = ir.VectorType(ir.IntType(32), _VALUES)
_FLOATS = ir.VectorType(ir.FloatType(), _VALUES)
_INDEX = ir.IntType(64)


_room = on_stack(2 * _PIECE + 1 + _BYTES, np.uint8)
"""For the codes of a piece, then for the zeros of its groups, which may be as many and one more, and what :func:`unpack` writes after."""


@intrinsic
def _unpack_vector(
    _context: Any, packed: Any, low: Any, low_shift: Any, low_mask: Any, high: Any, high_shift: Any, high_mask: Any,
    out: Any, to: Any,
) -> Any:  # fmt: skip
    """``out[to : to + 64]`` from the two planes at ``packed[low:]`` and ``packed[high:]``, see :func:`_code`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, low, low_shift, low_mask, high, high_shift, high_mask, out, to = arguments

        def plane(at: Any, shift: Any) -> Any:
            source = pointer(context, builder, signature.args[0], packed, at, _MANY_BYTES)
            return builder.lshr(builder.load(source, align=1), splat(builder, shift, _MANY_BYTES))

        low_bits = builder.and_(plane(low, low_shift), splat(builder, low_mask, _MANY_BYTES))
        two = ir.Constant(_MANY_BYTES, [2] * _BYTES)
        high_bits = builder.shl(plane(high, high_shift), two)
        high_bits = builder.and_(high_bits, splat(builder, high_mask, _MANY_BYTES))
        target = pointer(context, builder, signature.args[7], out, to, _MANY_BYTES)
        builder.store(builder.or_(low_bits, high_bits), target, align=1)
        return context.get_dummy_value()

    return types.void(packed, low, low_shift, low_mask, high, high_shift, high_mask, out, to), generate


@jit()
def _code(low: int, low_shift: int, low_mask: int, high: int, high_shift: int, high_mask: int) -> Any:
    """The code whose low bits are in the byte ``low`` and whose third bit is in the byte ``high``."""
    return np.uint8((low >> low_shift) & low_mask | (high >> high_shift << 2) & high_mask)


@jit(borrows=True)
def _part(column: int, length: int) -> int:
    """In which part of so many columns it is, counted instead of divided: there are eight at most."""
    index = 0
    while (index + 1) * length <= column:
        index += 1
    return index


@jit(borrows=True)
def unpack(packed: Any, row: int, bits: int, n: int, start: int, count: int, out: Any, to: int) -> None:
    """Codes ``[start, start + count)`` of a row of ``n`` to ``out[to:]``; the row begins at ``packed[row]``.

    Up to 63 bytes of ``out`` after them are overwritten.
    """
    width = 2 if bits == 3 else bits
    low_part = (n * width + 7) // 8
    high_part = (n + 7) // 8 if bits == 3 else n
    low_mask, high_mask = np.uint8((1 << width) - 1), np.uint8(4 if bits == 3 else 0)
    low_index, high_index = _part(start, low_part), _part(start, high_part)
    k = 0
    while k < count:  # as far as both planes are in one part
        low_at, high_at = start + k - low_index * low_part, start + k - high_index * high_part
        take = min(count - k, low_part - low_at, high_part - high_at)
        low_shift, high_shift = np.uint8(low_index * width), np.uint8(high_index)
        low = row + low_at
        high = row + low_part + high_at if bits == 3 else low
        j = 0
        while j < take:
            if high + j + _BYTES <= packed.size:  # beyond the row is fine, and beyond the end isn't
                _unpack_vector(
                    packed, low + j, low_shift, low_mask, high + j, high_shift, high_mask, out, to + k + j
                )
                j += _BYTES
            else:
                out[to + k + j] = _code(
                    packed[low + j], low_shift, low_mask, packed[high + j], high_shift, high_mask
                )
                j += 1
        k += take
        low_index += low_at + take == low_part
        high_index += high_at + take == high_part


def _put_values(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """What :func:`_scale_vectors` generates."""
    codes, at, zero, scale, out, to, vectors = arguments
    kinds = signature.args
    for width, first in loops(builder, vectors, _AT_ONCE):
        k = builder.mul(first, _INDEX(_VALUES))
        values = []
        for part in range(width):
            place = builder.add(builder.add(at, k), _INDEX(part * _VALUES))
            source = pointer(context, builder, kinds[0], codes, place, _FEW_BYTES)
            wide = builder.zext(builder.load(source, align=1), _WHOLE)
            values.append(_values(builder, builder.uitofp(wide, _FLOATS), zero, scale))
        put_numbers(context, builder, kinds[4], out, builder.add(to, k), values)
    return context.get_dummy_value()


@intrinsic
def _scale_vectors(
    _context: Any, codes: Any, _at: Any, _zero: Any, _scale: Any, out: Any, _to: Any, _vectors: Any
) -> Any:
    """``out[to + k] = (codes[at + k] - zero) * scale`` for so many vectors of sixteen."""
    i64 = types.int64
    return types.void(codes, i64, types.float32, types.float32, out, i64, i64), _put_values


@intrinsic
def _look_vectors_up(
    _context: Any, codes: Any, _at: Any, _zero: Any, _scale: Any, out: Any, _to: Any, _vectors: Any
) -> Any:
    """The same of codes below sixteen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not has(context, "avx512f"):  # AVX2's lookup of sixteen takes as long as the values do
            return _put_values(context, builder, signature, arguments)
        codes, at, zero, scale, out, to, vectors = arguments
        kinds = signature.args
        all_codes = ir.Constant(_FLOATS, [float(code) for code in range(_VALUES)])
        table = Table(context, builder, kinds[4], _values(builder, all_codes, zero, scale))
        for width, first in loops(builder, vectors, _AT_ONCE):
            for part in range(0, width, table.at_once):
                count = min(table.at_once, width - part) * _VALUES
                k = builder.add(builder.mul(first, _INDEX(_VALUES)), _INDEX(part * _VALUES))
                bytes_of = ir.VectorType(_FEW_BYTES.element, count)
                source = pointer(context, builder, kinds[0], codes, builder.add(at, k), bytes_of)
                index = builder.zext(builder.load(source, align=1), ir.VectorType(table.index, count))
                table.put(out, builder.add(to, k), index)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(codes, i64, types.float32, types.float32, out, i64, i64), generate


def _values(builder: Any, codes: Any, zero: Any, scale: Any) -> Any:
    return builder.fmul(builder.fsub(codes, splat(builder, zero, _FLOATS)), splat(builder, scale, _FLOATS))


@jit(borrows=True)
def _scale_row(
    codes: Any, zeros_at: int, bits: int, scales: Any, o: int, group: int, first: int, start: int, out: Any
) -> None:
    """The values of unpacked codes, of columns ``start ...`` of row ``o``, which are in groups ``first ...``, to all of ``out``.

    ``codes[zeros_at:]`` are the groups' zeros; where it is 0 there are none.
    """
    columns, g, k = out.size, first, 0
    zero = np.float32(1 << (bits - 1))
    while k < columns:
        if zeros_at:
            zero = np.float32(codes[zeros_at + g - first])
        scale = from_half(scales[o, g])
        g += 1
        end = min(columns, g * group - start)
        vectors = (end - k) // _VALUES
        if bits <= 4:
            _look_vectors_up(codes, k, zero, scale, out, k, vectors)
        else:
            _scale_vectors(codes, k, zero, scale, out, k, vectors)
        k += vectors * _VALUES
        while k < end:
            out[k] = narrow((np.float32(codes[k]) - zero) * scale, out[k])
            k += 1


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Stored columns ``start ...`` of the rows from ``row`` on: see :class:`modulora_core.kernels.products.RowKernels`.

    ``weight`` is codes, scales, zeros, bits, the columns of a group, and those of a row. What is the same in each row is divided once
    (docs/performance-findings.md).
    """
    codes, scales, zeros, bits, group, n = weight
    rows, groups = max(1, len(scales)), scales.shape[1]
    row_bytes, zero_bytes = codes.size // rows, zeros.size // rows
    room = _room()
    for at in range(0, columns, _PIECE):
        begin, count = start + at, min(_PIECE, columns - at)
        first = begin // group
        of_groups = (begin + count - 1) // group + 1 - first
        # its parts are all over the row: as much as it is of the row, so that all of it is asked for once
        ahead, asked = row_bytes * begin // n, row_bytes * count // n
        for r in range(len(out)):
            o = row + r
            read_ahead(codes, o * row_bytes + ahead, asked)
            unpack(codes, o * row_bytes, bits, n, begin, count, room, 0)
            if zero_bytes:
                unpack(zeros, o * zero_bytes, bits, groups, first, of_groups, room, count)
            zeros_at = count if zero_bytes else 0
            _scale_row(room, zeros_at, bits, scales, o, group, first, begin, out[r, at : at + count])
