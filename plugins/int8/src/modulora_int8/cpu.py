"""INT8 on the CPU, compiled by numba: the same values as :mod:`modulora_int8.reference`, at the speed of memory.

A tile reads one byte and writes four for each weight, so writing is the floor; a product of few rows reads the codes
once, in·out bytes, and decodes each row into the L1 cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_int8.reference import INVERSE

_INVERSE = np.float32(INVERSE)
_ROWS = 16  # rows that a thread takes at once in matmul
_COLUMNS = 512  # columns that a thread takes at once in matmul_transposed: an accumulator stays in the L1 cache


@jit()
def _scaled(codes: Any, scale: Any, out: Any) -> None:
    """Slices of their own, from 0 on: indices that can't be negative are what LLVM vectorises."""
    for k in range(out.size):
        out[k] = np.float32(codes[k]) * scale * _INVERSE


@jit()
def _decode(codes: Any, scales: Any, group: int, start: int, out: Any) -> None:
    """Columns ``start ...`` of one row to all of ``out``; ``scales`` are those of the row."""
    k = 0
    while k < out.size:
        index = (start + k) // group
        end = min(out.size, (index + 1) * group - start)
        _scaled(codes[start + k : start + end], scales[index], out[k:end])
        k = end


@jit(parallel=True)
def dequantize(codes: Any, scales: Any, group: int, out: Any) -> None:
    """Rows ``codes`` ``[rows, in]`` with ``scales`` ``[rows, groups]`` to ``out`` ``[rows, in]``, fp32."""
    for row in prange(out.shape[0]):
        _decode(codes[row], scales[row], group, 0, out[row])


@jit(fastmath=("reassoc", "contract", "nsz"))
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for k in range(a.size):
        total += a[k] * b[k]
    return total


@jit(parallel=True)
def matmul(codes: Any, scales: Any, group: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for few rows: ``x`` is ``[n, in]``, ``y`` is ``[n, out]``."""
    rows, in_features = x.shape
    out_features = y.shape[1]
    for piece in prange((out_features + _ROWS - 1) // _ROWS):
        w = np.empty(in_features, np.float32)
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, out_features)):
            _decode(codes[o], scales[o], group, 0, w)
            for r in range(rows):
                y[r, o] = _dot(w, x[r])


@jit(fastmath=("contract",))
def _add_four(total: Any, w: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    for k in range(total.size):
        total[k] += a * w[0, k] + b * w[1, k] + c * w[2, k] + d * w[3, k]


@jit(parallel=True)
def matmul_transposed(codes: Any, scales: Any, group: int, y: Any, x: Any) -> None:
    """``x = y Ŵ`` for few rows: ``y`` is ``[n, out]``, ``x`` is ``[n, in]``.

    Threads share the columns, so that each sum over the rows of Ŵ has the same order for any number of threads. Four
    rows at a time, because loading and storing the sums costs as much as adding to them.
    """
    rows, out_features = y.shape
    in_features = x.shape[1]
    for piece in prange((in_features + _COLUMNS - 1) // _COLUMNS):
        start = piece * _COLUMNS
        width = min(_COLUMNS, in_features - start)
        w = np.zeros((4, width), np.float32)
        total = np.zeros((rows, width), np.float32)
        for o in range(0, out_features, 4):
            four = min(4, out_features - o)
            for j in range(four):
                _decode(codes[o + j], scales[o + j], group, start, w[j])
            for j in range(four, 4):
                w[j, :] = 0
            for r in range(rows):
                b = y[r, o + 1] if four > 1 else np.float32(0)
                c = y[r, o + 2] if four > 2 else np.float32(0)
                d = y[r, o + 3] if four > 3 else np.float32(0)
                _add_four(total[r], w, y[r, o], b, c, d)
        x[:, start : start + width] = total
