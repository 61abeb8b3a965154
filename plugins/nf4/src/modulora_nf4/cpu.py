"""NF4 on the CPU, compiled by numba: tiles, few-row products, and quantizing.

Everything works on the flat, row-major weight, as :mod:`modulora_nf4.cpu_decode` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.products import RowKernels
from modulora_core.kernels.vectors import LANES, has, lookup, loops, pointer, splat
from modulora_nf4.cpu_decode import decode
from modulora_nf4.cpu_one_row import matmul_one, takes
from modulora_nf4.reference import LEVELS, SMALLEST_ABSMAX, ZERO, dynamic_map

_LEVELS = np.array(LEVELS, np.float32)
_MIDPOINTS = tuple((_LEVELS[1:] + _LEVELS[:-1]) / np.float32(2))
_SMALLEST = np.float32(SMALLEST_ABSMAX)
_DYNAMIC_MAP = dynamic_map().numpy()

_INDEX = ir.IntType(64)
_BYTES, _WHOLES, _FLOATS = (
    ir.VectorType(of, LANES) for of in (ir.IntType(8), ir.IntType(32), ir.FloatType())
)
_AT_ONCE = 4  # vectors: a lookup waits for the comparison before it, so those of several run side by side

_PIECE = 8192  # elements that a thread takes at once: 4 KiB of codes and 32 KiB of values

rows = RowKernels(decode, matmul_one, takes)
"""Tiles and few-row products."""


@jit(parallel=True)
def dequantize_absmax(
    codes: Any, nested_absmax: Any, offset: Any, nested_shift: int, first: int, out: Any
) -> None:
    """Blocks ``first ...`` of a double-quantized absmax to all of ``out``: two roundings, not one."""
    for piece in prange((out.size + _PIECE - 1) // _PIECE):
        for i in range(piece * _PIECE, min((piece + 1) * _PIECE, out.size)):
            block = first + i
            out[i] = _DYNAMIC_MAP[codes[block]] * nested_absmax[block >> nested_shift] + offset[0]


@jit()
def _largest(bits: Any) -> Any:
    """The bits of max |x|: the maximum of integers is vectorised, and NaN is above all numbers."""
    largest = np.int32(0)
    for k in range(bits.size):
        largest = max(largest, np.int32(bits[k] & 0x7FFFFFFF))
    return largest


@intrinsic
def _nearest_vectors(_context: Any, x: Any, _reciprocal: Any, q: Any, _vectors: Any) -> Any:
    """:func:`_nearest` for so many vectors of sixteen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, reciprocal, q, vectors = arguments
        kinds = signature.args
        factor = splat(builder, reciprocal, _FLOATS)
        for width, first in loops(builder, vectors, _AT_ONCE):
            for part in range(width):
                k = builder.mul(builder.add(first, _INDEX(part)), _INDEX(LANES))
                values = builder.load(pointer(context, builder, kinds[0], x, k, _FLOATS), align=4)
                codes = _codes(context, builder, builder.fmul(values, factor))
                place = pointer(context, builder, kinds[2], q, k, _BYTES)
                builder.store(builder.trunc(codes, _BYTES), place, align=1)
        return context.get_dummy_value()

    return types.void(x, types.float32, q, types.int64), generate


def _codes(context: Any, builder: Any, values: Any) -> Any:
    """How many midpoints are below each value: found by halves where sixteen can be looked up in registers, else counted."""
    none = ir.Constant(_WHOLES, [0] * LANES)

    def more(codes: Any, midpoints: Any, count: int) -> Any:
        above = builder.fcmp_ordered(">", values, midpoints)
        return builder.add(codes, builder.select(above, ir.Constant(_WHOLES, [count] * LANES), none))

    codes = none
    if has(context, "avx2") or has(context, "avx512f"):
        table = ir.Constant(
            _FLOATS, [float(m) for m in _MIDPOINTS] + [0.0]
        )  # the last one is never looked at
        for half in (8, 4, 2, 1):
            index = builder.add(codes, ir.Constant(_WHOLES, [half - 1] * LANES))
            codes = more(codes, lookup(context, builder, table, index), half)
        return codes
    for midpoint in _MIDPOINTS:
        codes = more(codes, ir.Constant(_FLOATS, [float(midpoint)] * LANES), 1)
    return codes


@jit()
def _nearest(x: Any, reciprocal: Any, q: Any) -> None:
    """The number of midpoints that are strictly below ``x · reciprocal``: a tie takes the lower level."""
    vectors = x.size // LANES
    _nearest_vectors(x, reciprocal, q, vectors)
    for k in range(vectors * LANES, x.size):
        v = x[k] * reciprocal
        code = np.int32(0)
        for m in _MIDPOINTS:
            code += np.int32(v > m)
        q[k] = code


@jit()
def _quantize_piece(x: Any, x_bits: Any, size: int, codes: Any, absmax: Any, absmax_bits: Any) -> None:
    """Whole blocks, and perhaps a short last one."""
    q = np.empty(x.size + 1, np.uint8)
    q[x.size] = ZERO  # fills the last byte of an odd number of elements
    for block in range(absmax.size):
        start, stop = block * size, min((block + 1) * size, x.size)
        absmax_bits[block] = _largest(x_bits[start:stop])
        divisor = max(absmax[block], _SMALLEST)
        if stop - start == size:
            _nearest(x[start:stop], np.float32(1) / divisor, q[start:])
        else:
            absmax[block] = divisor
            _nearest(x[start:stop] / divisor, np.float32(1), q[start:])
    for k in range(codes.size):
        codes[k] = (q[2 * k] << 4) | q[2 * k + 1]


@jit(parallel=True)
def quantize(x: Any, shift: int, codes: Any, absmax: Any) -> None:
    """The flat fp32 weight to bytes and an fp32 absmax for each block (``reference.quantize``)."""
    size = max(1 << shift, _PIECE)  # even: pieces share no byte
    x_bits, absmax_bits = x.view(np.int32), absmax.view(np.int32)
    for piece in prange((x.size + size - 1) // size):
        a, b = piece * size, min((piece + 1) * size, x.size)
        c, d = a >> shift, (b + (1 << shift) - 1) >> shift
        _quantize_piece(
            x[a:b], x_bits[a:b], 1 << shift, codes[a >> 1 : (b + 1) >> 1], absmax[c:d], absmax_bits[c:d]
        )
