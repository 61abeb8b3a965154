"""Activations to a byte each and back on the CPU, as :mod:`modulora_core.blockwise` has it.

    for each block of a row:    largest = max |x|    s = largest / 127    q = round(x · (127 / largest))          x̂ = s · q

Each way moves an activation in its own dtype once, its code, which is a byte, and four bytes a block, and does some five operations on each
activation, which lies in the L1 cache meanwhile: the floor is the bandwidth of memory.

Activations of bf16 come as the int16 of their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.conversions import narrow_row, widen_row
from modulora_core.kernels.magnitudes import largest_bits

_PIECE = 16  # rows that a thread takes at once


@jit(borrows=True)
def _round(x: Any, reciprocal: Any, codes: Any) -> None:
    for k in range(codes.size):
        codes[k] = np.int8(np.int32(np.rint(x[k] * reciprocal)))


@jit(borrows=True)
def _scale(codes: Any, scale: Any, out: Any) -> None:
    for k in range(codes.size):
        out[k] = np.float32(codes[k]) * scale


@jit(parallel=True)
def quantize(x: Any, block: int, smallest: Any, codes: Any, scales: Any) -> None:
    """``codes`` int8 ``[n, d]`` and ``scales`` fp32 ``[n, blocks]`` of ``x``; blocks without a magnitude of ``smallest`` are zeros."""
    n, d = x.shape
    for piece in prange((n + _PIECE - 1) // _PIECE):
        numbers = np.empty(block, np.float32)
        bits = numbers.view(np.int32)
        found = np.empty(1, np.float32)
        begin: Any = np.int64(piece) * _PIECE
        for row in range(begin, min(begin + _PIECE, n)):
            for start in range(0, d, block):
                size = min(block, d - start)
                widen_row(x[row, start : start + size], numbers[:size])
                found.view(np.int32)[0] = largest_bits(bits[:size])
                largest = found[0]
                scales[row, start // block] = largest / np.float32(127)
                reciprocal = np.float32(127) / largest if largest >= smallest else np.float32(0)
                _round(numbers[:size], reciprocal, codes[row, start : start + size])


@jit(parallel=True)
def dequantize(codes: Any, scales: Any, block: int, x: Any) -> None:
    """All of ``x``, ``[n, d]``, of what :func:`quantize` made."""
    n, d = x.shape
    for piece in prange((n + _PIECE - 1) // _PIECE):
        numbers = np.empty(block, np.float32)
        begin: Any = np.int64(piece) * _PIECE
        for row in range(begin, min(begin + _PIECE, n)):
            for start in range(0, d, block):
                size = min(block, d - start)
                _scale(codes[row, start : start + size], scales[row, start // block], numbers[:size])
                narrow_row(numbers[:size], x[row, start : start + size])
