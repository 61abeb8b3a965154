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
from modulora_core.kernels.cpu.magnitudes import largest_bits
from modulora_core.kernels.cpu.prefetch import FAR, ask_for
from modulora_core.kernels.cpu.products import RowKernels
from modulora_core.kernels.cpu.vectors import LANES, loops, pointer, splat
from modulora_nf4.cpu_codes import MIDPOINTS, codes_of, in_pairs
from modulora_nf4.cpu_decode import decode, decode_nested
from modulora_nf4.cpu_one_row import matmul_one, matmul_one_nested, takes
from modulora_nf4.reference import (
    NESTED_BLOCK_SIZE,
    SMALLEST_ABSMAX,
    ZERO,
    codes_of_points,
)

_SMALLEST = np.float32(SMALLEST_ABSMAX)
_CODES_OF_POINTS = codes_of_points().numpy()

_BYTE, _INDEX = ir.IntType(8), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_AT_ONCE = 2  # vectors: a lookup waits for what is looked up, so those of several run side by side

_PIECE = 8192  # elements that a thread takes at once: 4 KiB of codes and 32 KiB of values

rows = RowKernels(decode, matmul_one, takes, rounds=True)
"""Tiles and few-row products."""

nested_rows = RowKernels(decode_nested, matmul_one_nested, takes, rounds=True)
"""The same where constants are quantized too."""


@intrinsic
def _pack_vectors(
    _context: Any, x: Any, reciprocals: Any, _shift: Any, packed: Any, _vectors: Any
) -> Any:
    """The bytes of so many vectors of sixteen, in blocks of 2 to the ``shift``, sixteen or more: see :func:`_nearest`.

    Memory is asked for the next piece meanwhile, since nothing is read from it here.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, reciprocals, shift, packed, vectors = arguments
        kinds = signature.args

        def codes_at(vector: Any) -> Any:
            k = builder.mul(vector, _INDEX(LANES))
            then = builder.add(k, _INDEX(_PIECE))
            ask_for(builder, pointer(context, builder, kinds[0], x, then, _BYTE), FAR)
            values = builder.load(pointer(context, builder, kinds[0], x, k, _FLOATS), align=4)
            block = builder.lshr(k, shift)
            factor = builder.load(
                pointer(context, builder, kinds[1], reciprocals, block, _FLOATS.element)
            )
            return codes_of(context, builder, builder.fmul(values, splat(builder, factor, _FLOATS)))

        for width, first in loops(builder, vectors, _AT_ONCE):
            of_vectors = [codes_at(builder.add(first, _INDEX(part))) for part in range(width)]
            byte = builder.mul(first, _INDEX(LANES // 2))
            for pairs in in_pairs(context, builder, of_vectors):
                builder.store(
                    pairs, pointer(context, builder, kinds[3], packed, byte, pairs.type), align=1
                )
                byte = builder.add(byte, _INDEX(pairs.type.count))
        return context.get_dummy_value()

    return types.void(x, reciprocals, types.int64, packed, types.int64), generate


@jit(borrows=True)
def _nearest(x: Any, reciprocal: Any, q: Any) -> None:
    """The number of midpoints that are strictly below ``x · reciprocal``: a tie takes the lower level."""
    for k in range(x.size):
        v = x[k] * reciprocal
        code = np.int32(0)
        for m in MIDPOINTS:
            code += np.int32(v > m)
        q[k] = code


@jit()
def _quantize_piece(
    x: Any, x_bits: Any, shift: int, codes: Any, absmax: Any, absmax_bits: Any
) -> None:
    """Whole blocks, and perhaps a short last one."""
    size, whole = 1 << shift, x.size >> shift
    reciprocals = np.empty(whole, np.float32)
    for block in range(whole):
        absmax_bits[block] = largest_bits(x_bits[block * size : (block + 1) * size])
        reciprocals[block] = np.float32(1) / max(absmax[block], _SMALLEST)
    done = whole * size if size >= LANES else 0
    _pack_vectors(x, reciprocals, shift, codes, done // LANES)
    if done < x.size:
        first = done >> shift
        _quantize_rest(
            x[done:], x_bits[done:], shift, codes[done >> 1 :], absmax[first:], absmax_bits[first:]
        )


@jit()
def _quantize_rest(
    x: Any, x_bits: Any, shift: int, codes: Any, absmax: Any, absmax_bits: Any
) -> None:
    """Blocks that are shorter than a vector, whose ``absmax`` is known, and a short last one, whose isn't."""
    size, whole = 1 << shift, x.size >> shift
    q = np.empty(x.size + 1, np.uint8)
    q[x.size] = ZERO  # fills the last byte of an odd number of elements
    for block in range(whole):
        start, stop = block * size, (block + 1) * size
        _nearest(x[start:stop], np.float32(1) / max(absmax[block], _SMALLEST), q[start:stop])
    if whole < absmax.size:
        start = whole * size
        absmax_bits[whole] = largest_bits(x_bits[start:])
        absmax[whole] = max(absmax[whole], _SMALLEST)
        _nearest(x[start:] / absmax[whole], np.float32(1), q[start:])
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
            x[a:b], x_bits[a:b], shift, codes[a >> 1 : (b + 1) >> 1], absmax[c:d], absmax_bits[c:d]
        )


@jit(parallel=True)
def double_quantize(c2: Any, mean: Any, q2: Any, c1: Any) -> None:
    """The constants ``c2`` to codes, and a constant for each 256 of them (``reference.double_quantize``); ``mean``: of all, ``[1]``."""
    one, half, points = np.float32(1), np.float32(0.5), np.float32(65535)
    for block in prange(c1.size):
        a, b = block * NESTED_BLOCK_SIZE, min((block + 1) * NESTED_BLOCK_SIZE, c2.size)
        centred = c2[a:b] - mean[0]
        largest = np.float32(0)
        for k in range(centred.size):
            largest = max(largest, abs(centred[k]))
        c1[block] = largest
        # infinite for the smallest numbers, and infinity times zero is NaN
        factor = one / largest if largest else np.float32(0)
        for k in range(centred.size):
            value = centred[k] * factor
            scaled = min(value, one) if largest and value > -one else -one
            q2[a + k] = _CODES_OF_POINTS[np.int32((scaled + one) * half * points + half)]
