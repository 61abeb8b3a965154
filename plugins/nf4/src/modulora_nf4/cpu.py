"""NF4 on the CPU, compiled by numba: tiles, few-row products, and quantizing.

Everything works on the flat, row-major weight, as :mod:`modulora_nf4.cpu_decode` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.products import RowKernels
from modulora_nf4.cpu_decode import decode
from modulora_nf4.cpu_one_row import matmul_one, takes
from modulora_nf4.reference import LEVELS, SMALLEST_ABSMAX, ZERO, dynamic_map

_LEVELS = np.array(LEVELS, np.float32)
_MIDPOINTS = tuple((_LEVELS[1:] + _LEVELS[:-1]) / np.float32(2))
_SMALLEST = np.float32(SMALLEST_ABSMAX)
_DYNAMIC_MAP = dynamic_map().numpy()

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


@jit()
def _nearest(x: Any, reciprocal: Any, q: Any) -> None:
    """The number of midpoints that are strictly below ``x · reciprocal``: a tie takes the lower level."""
    for k in range(x.size):
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
