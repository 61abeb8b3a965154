"""INT8 on the CPU, compiled by numba: the values of :mod:`modulora_int8.reference` at the speed of memory.

``codes`` is int8 ``[out, in]``, ``scales`` fp32 ``[out, groups]``, and ``group`` the number of columns that
share a scale. A product of few rows multiplies the codes as they are and scales the sum of each group, so it
reads one byte for a weight and writes none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_int8.reference import INVERSE, LARGEST, SMALLEST_SCALE

_INVERSE = np.float32(INVERSE)
_LARGEST = np.float32(LARGEST)
_SMALLEST_SCALE = np.float32(SMALLEST_SCALE)
_NO_FRACTION = np.float32(
    1.5 * 2**23
)  # added and taken off, it leaves the nearest whole number, halves to even
_ROWS = 16  # rows that a thread takes at once
_COLUMNS = 512  # columns that a thread takes at once in matmul_transposed: their sums stay in the L1 cache


@jit()
def _scaled(codes: Any, scale: Any, out: Any) -> None:
    """Slices of their own, from 0 on: indices that can't be negative are what LLVM vectorises."""
    for k in range(out.size):
        out[k] = np.float32(codes[k]) * scale * _INVERSE


@jit(parallel=True)
def dequantize(codes: Any, scales: Any, group: int, out: Any) -> None:
    """Rows ``codes`` with their ``scales`` to ``out`` ``[rows, in]``, fp32."""
    rows, in_features = out.shape
    for row in prange(rows):
        for g in range(scales.shape[1]):
            start, stop = g * group, min((g + 1) * group, in_features)
            _scaled(codes[row, start:stop], scales[row, g], out[row, start:stop])


@jit(fastmath=("reassoc", "contract", "nsz"))
def _dot(codes: Any, x: Any) -> Any:
    total = np.float32(0)
    for k in range(codes.size):
        total += np.float32(codes[k]) * x[k]
    return total


@jit(parallel=True)
def matmul(codes: Any, scales: Any, group: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for few rows: ``x`` is ``[n, in]``, ``y`` is ``[n, out]``."""
    rows, in_features = x.shape
    out_features = y.shape[1]
    for piece in prange((out_features + _ROWS - 1) // _ROWS):
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, out_features)):
            for r in range(rows):
                total = np.float32(0)
                for g in range(scales.shape[1]):
                    start, stop = g * group, min((g + 1) * group, in_features)
                    total += _dot(codes[o, start:stop], x[r, start:stop]) * (scales[o, g] * _INVERSE)
                y[r, o] = total


@jit(fastmath=("contract",))
def _add(total: Any, a: Any, codes: Any) -> None:
    for k in range(total.size):
        total[k] += a * np.float32(codes[k])


@jit(fastmath=("contract",))
def _add_four(total: Any, a: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> None:
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    for k in range(total.size):
        total[k] += (
            a0 * np.float32(c0[k]) + a1 * np.float32(c1[k]) + a2 * np.float32(c2[k]) + a3 * np.float32(c3[k])
        )


@jit()
def _add_rows(total: Any, y: Any, codes: Any, scales: Any, start: int, stop: int) -> None:
    """``total += y Ŵ`` for columns ``start ... stop`` of one group; ``scales`` ``[out]`` are those of the group."""
    rows, out_features = y.shape
    a = np.empty(4, np.float32)
    whole = out_features // 4 * 4
    for o in range(0, whole, 4):
        c0, c1 = codes[o, start:stop], codes[o + 1, start:stop]
        c2, c3 = codes[o + 2, start:stop], codes[o + 3, start:stop]
        for r in range(rows):
            for j in range(4):
                a[j] = y[r, o + j] * (scales[o + j] * _INVERSE)
            _add_four(total[r], a, c0, c1, c2, c3)
    for o in range(whole, out_features):
        for r in range(rows):
            _add(total[r], y[r, o] * (scales[o] * _INVERSE), codes[o, start:stop])


@jit(parallel=True)
def matmul_transposed(codes: Any, scales: Any, group: int, y: Any, x: Any) -> None:
    """``x = y Ŵ`` for few rows: ``y`` is ``[n, out]``, ``x`` is ``[n, in]``.

    Threads share the columns, so that each sum over the rows of Ŵ has the same order for any number of
    threads. Four rows at a time, because loading and storing the sums costs as much as adding to them.
    """
    in_features = x.shape[1]
    for piece in prange((in_features + _COLUMNS - 1) // _COLUMNS):
        start = piece * _COLUMNS
        end = min(start + _COLUMNS, in_features)
        while start < end:
            g = start // group
            stop = min(end, (g + 1) * group)
            total = np.zeros((x.shape[0], stop - start), np.float32)
            _add_rows(total, y, codes, scales[:, g], start, stop)
            x[:, start:stop] = total
            start = stop


@jit()
def _largest(bits: Any) -> Any:
    """The bits of max |x|: the maximum of integers is vectorised, and NaN is above all numbers."""
    largest = np.int32(0)
    for k in range(bits.size):
        largest = max(largest, np.int32(bits[k] & 0x7FFFFFFF))
    return largest


@jit()
def _nearest(x: Any, factor: Any, codes: Any) -> None:
    for k in range(x.size):
        codes[k] = np.int8(np.int32((x[k] * factor + _NO_FRACTION) - _NO_FRACTION))


@jit(parallel=True)
def quantize(x: Any, group: int, codes: Any, scales: Any) -> None:
    """Rows ``x``, fp32 ``[rows, in]``, to codes and the absmax of each group (``reference.quantize``)."""
    bits, scale_bits = x.view(np.int32), scales.view(np.int32)
    rows, in_features = x.shape
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        for row in range(piece * _ROWS, min((piece + 1) * _ROWS, rows)):
            for g in range(scales.shape[1]):
                start, stop = g * group, min((g + 1) * group, in_features)
                scale_bits[row, g] = _largest(bits[row, start:stop])
                if scales[row, g] < _SMALLEST_SCALE:
                    scales[row, g] = 0
                    codes[row, start:stop] = 0
                else:
                    _nearest(x[row, start:stop], _LARGEST / scales[row, g], codes[row, start:stop])
