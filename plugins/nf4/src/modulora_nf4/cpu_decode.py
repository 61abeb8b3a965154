"""How the CPU decodes NF4, compiled by numba: the values of :mod:`modulora_nf4.reference` at the speed of memory.

Everything works on the flat, row-major weight: element ``i`` is in block ``i >> shift`` and in byte
``i >> 1``, and a row may start in the middle of either. ``absmax`` is fp32, one number for each block; where these are quantized
too, they are computed for the blocks of some columns at a time.
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
from modulora_core.kernels.cpu.conversions import narrow, put_numbers
from modulora_core.kernels.cpu.prefetch import read_ahead
from modulora_core.kernels.cpu.scratch import on_stack
from modulora_core.kernels.cpu.tables import Table
from modulora_core.kernels.cpu.vectors import LANES, has, lookup, pointer, splat
from modulora_nf4.reference import LEVELS, NESTED_BLOCK_SIZE, dynamic_map

_LEVELS = np.array(LEVELS, np.float32)
_PAIRS = np.stack(
    [np.repeat(_LEVELS, 16), np.tile(_LEVELS, 16)], axis=1
)  # [256, 2]: both levels of a byte
_DYNAMIC_MAP = dynamic_map().numpy()

_absmax = on_stack(1024, np.float32)  # of as many blocks at a time

_F32, _I8, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(64)
_FLOATS = ir.VectorType(_F32, LANES)
_ALL_LEVELS = ir.Constant(_FLOATS, [float(level) for level in LEVELS])

_RUN = 64  # as long as most blocks


def levels(context: Any, builder: Any, index: Any) -> Any:
    """The levels of sixteen codes: ``<16 x i32>``, of which the low four bits are looked at, to ``<16 x float>``."""
    return lookup(context, builder, _ALL_LEVELS, index)


def _decode_runs(size: int) -> Any:
    """The intrinsic for runs of ``size`` codes, sixteen or a multiple of 32.

    ``(codes, byte, absmax, block, out, to, runs, blocks)`` writes ``absmax · level`` of so many runs of each of so many blocks, from
    ``codes[byte]`` and ``absmax[block]`` on, to ``out[to:]``. A run has no loop inside, which would take as long again
    (docs/performance-findings.md).
    """

    @intrinsic
    def decode_runs(
        _context: Any, codes: Any, _byte: Any, absmax: Any, _block: Any, out: Any, _to: Any, _runs: Any, _blocks: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, byte, absmax, block, out, to, runs, blocks = arguments
            kinds = signature.args
            with cgutils.for_range(builder, blocks) as loop:
                number = builder.add(block, loop.index)
                scale = builder.load(pointer(context, builder, kinds[2], absmax, number, _F32))
                put = _put(context, builder, kinds[0], codes, scale, kinds[4], out)
                begin = builder.mul(loop.index, runs)
                with cgutils.for_range(builder, runs) as run:
                    done = builder.mul(builder.add(begin, run.index), _I64(size))
                    put(
                        builder.add(byte, builder.ashr(done, _I64(1))),
                        builder.add(to, done),
                        size // LANES,
                    )
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(codes, i64, absmax, i64, out, i64, i64, i64), generate

    return decode_runs


_decode_long, _decode_short = _decode_runs(_RUN), _decode_runs(LANES)


def _put(
    context: Any, builder: Any, codes_kind: Any, codes: Any, scale: Any, out_kind: Any, out: Any
) -> Callable[[Any, Any, int], None]:
    """Generates, at each call, ``put(byte, to, vectors)``: so many vectors of codes from ``codes[byte]`` on, times the scale, to
    ``out[to:]``. Arrays come with their numba types.
    """
    if not has(context, "avx2") and not has(context, "avx512f"):
        return _put_by_bytes(context, builder, codes_kind, codes, scale, out_kind, out)
    table = Table(
        context, builder, out_kind, builder.fmul(_ALL_LEVELS, splat(builder, scale, _FLOATS))
    )

    def put(byte: Any, to: Any, vectors: int) -> None:
        for part in range(0, vectors, table.at_once):
            of = ir.VectorType(_I8, min(table.at_once, vectors - part) * LANES // 2)
            at = builder.add(byte, _I64(part * LANES // 2))
            found = builder.load(pointer(context, builder, codes_kind, codes, at, of), align=1)
            table.put(out, builder.add(to, _I64(part * LANES)), _both(builder, found, table.index))

    return put


def _put_by_bytes(
    context: Any, builder: Any, codes_kind: Any, codes: Any, scale: Any, out_kind: Any, out: Any
) -> Callable[[Any, Any, int], None]:
    """What :func:`_put` is without instructions for a lookup: both levels of a byte are side by side in memory."""
    table = ir.Constant(ir.ArrayType(_F32, _PAIRS.size), _PAIRS.ravel().tolist())
    pairs = cgutils.global_constant(builder, "nf4_pairs", table)

    def level(byte: Any, k: int) -> Any:
        place = pointer(context, builder, codes_kind, codes, builder.add(byte, _I64(k // 2)), _I8)
        at = builder.add(builder.shl(builder.zext(builder.load(place), _I64), _I64(1)), _I64(k % 2))
        return builder.load(builder.gep(pairs, [_I64(0), at]))

    def put(byte: Any, to: Any, vectors: int) -> None:
        for first in range(0, vectors * LANES, LANES):
            levels_here = ir.Constant(_FLOATS, ir.Undefined)
            for k in range(LANES):
                levels_here = builder.insert_element(
                    levels_here, level(byte, first + k), ir.IntType(32)(k)
                )
            values = builder.fmul(levels_here, splat(builder, scale, _FLOATS))
            put_numbers(context, builder, out_kind, out, builder.add(to, _I64(first)), [values])

    return put


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
def _decode_each(codes: Any, absmax: Any, first: int, shift: int, start: int, out: Any) -> None:
    """Elements ``start ...`` of the flat weight to all of ``out``, whatever these are; ``absmax`` begins with block ``first``."""
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
        _decode_short(codes, i >> 1, absmax, block - first, out, o, vectors, 1)
        i, o = i + vectors * LANES, o + vectors * LANES
        while i < end:
            byte = np.int32(codes[i >> 1])
            out[o] = narrow(_LEVELS[byte & 15 if i & 1 else byte >> 4] * scale, out[o])
            i, o = i + 1, o + 1


@jit(borrows=True)
def _decode(codes: Any, absmax: Any, first: int, shift: int, start: int, out: Any) -> None:
    """The same, of runs that are in one block each without a thought for each of them."""
    run = _RUN if 1 << shift >= _RUN else LANES
    has_runs = start % run == 0 and 1 << shift >= run
    done, whole = 0, out.size // run * run if has_runs else 0
    while done < whole:
        at = start + done
        block = at >> shift
        # what is left of a block, or all blocks that are whole
        size = min(((block + 1) << shift) - at, whole - done)
        blocks = max(1, (whole - done) >> shift) if size == 1 << shift else 1
        if run == _RUN:
            _decode_long(codes, at >> 1, absmax, block - first, out, done, size // run, blocks)
        else:
            _decode_short(codes, at >> 1, absmax, block - first, out, done, size // run, blocks)
        done += blocks * size
    if done < out.size:
        _decode_each(codes, absmax, first, shift, start + done, out[done:])


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...`` of the rows from ``row`` on: see :class:`modulora_core.kernels.cpu.products.RowKernels`.

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
