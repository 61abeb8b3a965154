"""How the CPU decodes NF4, compiled by numba: the values of :mod:`modulora_nf4.reference` at the speed of memory.

Everything works on the flat, row-major weight: element ``i`` is in block ``i >> shift`` and in byte
``i >> 1``, and a row may start in the middle of either. ``absmax`` is fp32, one number for each block; where these are quantized
too, they are computed for the blocks of some columns at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.conversions import narrow, put_numbers
from modulora_core.kernels.prefetch import read_ahead
from modulora_core.kernels.scratch import on_stack
from modulora_core.kernels.tables import Table
from modulora_core.kernels.vectors import LANES, has, lookup, loops, pointer, splat
from modulora_nf4.reference import LEVELS, NESTED_BLOCK_SIZE, dynamic_map

_LEVELS = np.array(LEVELS, np.float32)
_PAIRS = np.stack([np.repeat(_LEVELS, 16), np.tile(_LEVELS, 16)], axis=1)  # [256, 2]: both levels of a byte
_DYNAMIC_MAP = dynamic_map().numpy()

_absmax = on_stack(1024, np.float32)  # of as many blocks at a time

_F32, _I8, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(64)
_FLOATS = ir.VectorType(_F32, LANES)
_ALL_LEVELS = ir.Constant(_FLOATS, [float(level) for level in LEVELS])

_AT_ONCE = 4  # vectors of sixteen: a block of 64, of which most are


def levels(context: Any, builder: Any, index: Any) -> Any:
    """The levels of sixteen codes: ``<16 x i32>``, of which the low four bits are looked at, to ``<16 x float>``."""
    return lookup(context, builder, _ALL_LEVELS, index)


@intrinsic
def _decode_vectors(
    _context: Any, codes: Any, _byte: Any, _scale: Any, out: Any, _to: Any, _vectors: Any
) -> Any:
    """``out[to + k] = scale · level`` of the codes from ``codes[byte]`` on, of one block, for so many vectors of sixteen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not has(context, "avx2") and not has(context, "avx512f"):
            return _decode_by_bytes(context, builder, signature, arguments)
        codes, byte, scale, out, to, vectors = arguments
        kinds = signature.args
        numbers = builder.fmul(_ALL_LEVELS, splat(builder, scale, _FLOATS))
        table = Table(context, builder, kinds[3], numbers)
        for width, first in loops(builder, vectors, _AT_ONCE):
            source = builder.add(byte, builder.mul(first, _I64(LANES // 2)))
            target = builder.add(to, builder.mul(first, _I64(LANES)))
            for part in range(0, width, table.at_once):
                of = ir.VectorType(_I8, min(table.at_once, width - part) * LANES // 2)
                at = builder.add(source, _I64(part * LANES // 2))
                place = pointer(context, builder, kinds[0], codes, at, of)
                index = _both(builder, builder.load(place, align=1), table.index)
                table.put(out, builder.add(target, _I64(part * LANES)), index)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(codes, i64, types.float32, out, i64, i64), generate


def _decode_by_bytes(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """What :func:`_decode_vectors` generates without instructions for a lookup: both levels of a byte are side by side in memory."""
    codes, byte, scale, out, to, vectors = arguments
    kinds = signature.args
    table = ir.Constant(ir.ArrayType(_F32, _PAIRS.size), _PAIRS.ravel().tolist())
    pairs = cgutils.global_constant(builder, "nf4_pairs", table)
    with cgutils.for_range(builder, vectors) as loop:
        source = builder.add(byte, builder.mul(loop.index, _I64(LANES // 2)))
        levels_here = ir.Constant(_FLOATS, ir.Undefined)
        for k in range(LANES):
            place = pointer(context, builder, kinds[0], codes, builder.add(source, _I64(k // 2)), _I8)
            at = builder.add(builder.shl(builder.zext(builder.load(place), _I64), _I64(1)), _I64(k % 2))
            level = builder.load(builder.gep(pairs, [_I64(0), at]))
            levels_here = builder.insert_element(levels_here, level, ir.IntType(32)(k))
        values = builder.fmul(levels_here, splat(builder, scale, _FLOATS))
        target = builder.add(to, builder.mul(loop.index, _I64(LANES)))
        put_numbers(context, builder, kinds[3], out, target, [values])
    return context.get_dummy_value()


def _both(builder: Any, codes: Any, of: ir.Type) -> Any:
    """Two lanes of each byte, of such a type, with its high code and its low one; above the low one's bits there are others."""
    pairs = ir.VectorType(ir.IntType(2 * of.width), codes.type.count)
    wide = builder.zext(codes, pairs)
    high, low = (
        move(wide, ir.Constant(pairs, [by] * pairs.count))
        for move, by in ((builder.lshr, 4), (builder.shl, of.width))
    )
    return builder.bitcast(builder.or_(high, low), ir.VectorType(of, 2 * pairs.count))


@jit(borrows=True)
def _decode_whole(codes: Any, absmax: Any, first: int, shift: int, start: int, out: Any) -> None:
    """Elements ``start ...`` of the flat weight to all of ``out``, whole vectors, none of which is in two blocks."""
    o = 0
    while o < out.size:
        block = (start + o) >> shift
        end = min(out.size, ((block + 1) << shift) - start)
        _decode_vectors(codes, (start + o) >> 1, absmax[block - first], out, o, (end - o) // LANES)
        o = end


@jit(borrows=True)
def _decode_each(codes: Any, absmax: Any, first: int, shift: int, start: int, out: Any) -> None:
    """The same of any elements."""
    stop = start + out.size
    i, o = start, 0
    while i < stop:
        block = i >> shift
        scale = absmax[block - first]
        end = min(stop, (block + 1) << shift)
        if i & 1:
            out[o] = narrow(_LEVELS[codes[i >> 1] & 15] * scale, out[o])
            i, o = i + 1, o + 1
        vectors = (end - i) // LANES
        _decode_vectors(codes, i >> 1, scale, out, o, vectors)
        i, o = i + vectors * LANES, o + vectors * LANES
        while i < end:
            byte = np.int32(codes[i >> 1])
            out[o] = narrow(_LEVELS[byte & 15 if i & 1 else byte >> 4] * scale, out[o])
            i, o = i + 1, o + 1


@jit(borrows=True)
def _decode(codes: Any, absmax: Any, first: int, shift: int, start: int, out: Any) -> None:
    """Elements ``start ...`` of the flat weight to all of ``out``; ``absmax`` begins with block ``first``."""
    is_whole = start % LANES == 0 and 1 << shift >= LANES
    whole = out.size // LANES * LANES if is_whole else 0
    _decode_whole(codes, absmax, first, shift, start, out[:whole])
    if whole < out.size:
        _decode_each(codes, absmax, first, shift, start + whole, out[whole:])


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...`` of the rows from ``row`` on: see :class:`modulora_core.kernels.products.RowKernels`.

    ``out`` may be of bf16 too. ``weight`` is codes, absmax, shift, and the length of a row.
    """
    codes, absmax, shift, in_features = weight
    for r in range(len(out)):
        begin = (row + r) * in_features + start
        read_ahead(codes, begin // 2, columns // 2)
        _decode(codes, absmax, 0, shift, begin, out[r, :columns])


@jit(borrows=True)
def _scale_map(codes: Any, constant: Any, offset: Any, out: Any) -> None:
    # whole arrays: LLVM doesn't take sixteen at once where an index might be negative
    for k in range(out.size):
        out[k] = _DYNAMIC_MAP[codes[k]] * constant + offset


@jit(borrows=True)
def put_absmax(codes: Any, constants: Any, mean: Any, first: int, out: Any) -> None:
    """The absmax of blocks ``first ...``, of codes and their constants, and the mean ``[1]``, to all of ``out``: two roundings, not one."""
    i, offset = 0, mean[0]
    while i < out.size:
        nested = (first + i) // NESTED_BLOCK_SIZE
        end = min(out.size, (nested + 1) * NESTED_BLOCK_SIZE - first)
        _scale_map(codes[first + i : first + end], constants[nested], offset, out[i:end])
        i = end


@jit(borrows=True)
def decode_nested(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """:func:`decode` where constants are quantized too; ``weight`` is codes, the codes of absmax, their constants, the mean, shift, and
    the length of a row.
    """
    codes, absmax_codes, constants, mean, shift, in_features = weight
    room = _absmax()
    for r in range(len(out)):
        begin = (row + r) * in_features + start
        read_ahead(codes, begin // 2, columns // 2)
        at = 0
        while at < columns:
            first = (begin + at) >> shift
            stop = min(columns, ((first + room.size) << shift) - begin)
            absmax = room[: ((begin + stop - 1) >> shift) + 1 - first]
            put_absmax(absmax_codes, constants, mean, first, absmax)
            _decode(codes, absmax, first, shift, begin + at, out[r, at:stop])
            at = stop
