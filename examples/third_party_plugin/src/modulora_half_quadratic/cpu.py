"""Half-quadratic weights on the CPU, compiled by numba: the values of the reference, decoded a row at a time.

In all kernels ``packed`` is uint8 ``[out, row_bytes]``, as :mod:`modulora_half_quadratic.packing` arranges it; ``scales`` and
``offsets`` are fp32 ``[out, groups]``, times the unit; ``group`` columns share one of each. Packing has no kernel: torch
vectorizes all that it does, the powers too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit

_ROWS = 16  # rows that a thread takes at once


@jit()
def _take_line(plane: Any, shift: int, mask: int, low: int, codes: Any) -> None:
    """Add a line of a plane to the codes, from their bit ``low`` on."""
    for k in range(codes.size):
        codes[k] |= ((plane[k] >> shift) & mask) << low


@jit()
def _unpack(packed: Any, bits: int, codes: Any) -> None:
    """All codes of the row ``packed``."""
    n = codes.size
    codes[:] = 0
    begin, low = 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            line = (n * width + 7) // 8
            plane = packed[begin : begin + line]
            mask = np.uint8((1 << width) - 1)
            for i in range(8 // width):
                part = codes[min(n, i * line) : min(n, (i + 1) * line)]
                _take_line(plane, np.uint8(i * width), mask, np.uint8(low), part)
            begin += line
            low += width


@jit()
def _scale(codes: Any, scale: Any, offset: Any, out: Any) -> None:
    for k in range(out.size):
        out[k] = np.float32(codes[k]) * scale + offset


@jit()
def _decode(packed: Any, scales: Any, offsets: Any, bits: int, group: int, codes: Any, out: Any) -> None:
    """A row of Ŵ from its bytes, scales and offsets; ``codes`` is scratch of the same length, uint8."""
    _unpack(packed, bits, codes)
    for g in range(scales.size):
        a, b = g * group, min((g + 1) * group, out.size)
        _scale(codes[a:b], scales[g], offsets[g], out[a:b])


@jit(parallel=True)
def dequantize(packed: Any, scales: Any, offsets: Any, bits: int, group: int, out: Any) -> None:
    """All rows to ``out``, fp32 ``[rows, in]``."""
    rows, n = out.shape
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        codes = np.empty(n, np.uint8)
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, rows)):
            _decode(packed[o], scales[o], offsets[o], bits, group, codes, out[o])


@jit(fastmath=("reassoc", "contract", "nsz"))
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for k in range(a.size):
        total += a[k] * b[k]
    return total


@jit(parallel=True)
def matmul(packed: Any, scales: Any, offsets: Any, bits: int, group: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for few rows: ``x`` is ``[n, in]``, ``y`` is ``[n, out]``. A row of Ŵ lives in the L1 cache."""
    rows, in_features = x.shape
    out_features = y.shape[1]
    for piece in prange((out_features + _ROWS - 1) // _ROWS):
        codes, w = np.empty(in_features, np.uint8), np.empty(in_features, np.float32)
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, out_features)):
            _decode(packed[o], scales[o], offsets[o], bits, group, codes, w)
            for r in range(rows):
                y[r, o] = _dot(w, x[r])


@jit(fastmath=("contract",))
def _add_four(total: Any, w: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    for k in range(total.size):
        total[k] += a * w[0, k] + b * w[1, k] + c * w[2, k] + d * w[3, k]


@jit(parallel=True)
def matmul_transposed(
    packed: Any, scales: Any, offsets: Any, bits: int, group: int, y: Any, sums: Any
) -> None:
    """``x = y Ŵ`` for few rows: ``y`` is ``[n, out]``, and ``x`` is the sum of ``sums`` ``[parts, n, in]``.

    Each part has its share of the rows of Ŵ. Four rows at a time, because loading and storing the sums costs as much
    as adding to them.
    """
    parts, rows, in_features = sums.shape
    out_features = y.shape[1]
    share = (out_features + parts - 1) // parts
    for part in prange(parts):
        last = min((part + 1) * share, out_features)
        sums[part] = 0
        codes, w = np.empty(in_features, np.uint8), np.zeros((4, in_features), np.float32)
        for first in range(part * share, last, 4):
            four = min(4, last - first)
            for j in range(four):
                o = first + j
                _decode(packed[o], scales[o], offsets[o], bits, group, codes, w[j])
            for r in range(rows):  # of what is left in w from the last four, nothing is added
                b = y[r, first + 1] if four > 1 else np.float32(0)
                c = y[r, first + 2] if four > 2 else np.float32(0)
                d = y[r, first + 3] if four > 3 else np.float32(0)
                _add_four(sums[part, r], w, y[r, first], b, c, d)
