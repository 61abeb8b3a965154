"""INT8 on the CPU, compiled by numba: the same values as :mod:`modulora_int8.reference`, at the speed of memory.

``codes`` are ``[out, in]``, ``scales`` ``[out, groups]``; ``group`` columns share a scale. The loops that should be
vectorised run over slices of their own, from 0 on: LLVM can't rule out that other indices are negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_int8.reference import HALF_RANGE, INVERSE, LARGEST, SMALLEST_ABSMAX

_INVERSE = np.float32(INVERSE)
_ONE, _LARGEST = np.float32(1), np.float32(LARGEST)
_SMALLEST = np.float32(SMALLEST_ABSMAX)
_FROM, _BELOW = np.float32(HALF_RANGE[0]), np.float32(HALF_RANGE[1])

_NORMAL = np.float32(
    2**-14
)  # fp16's smallest normal value; below it the step is 2⁻²⁴, above it a mantissa has 10 bits
_STEPS_OF_HALF = np.float32(0.75)  # adding it to less than 2⁻¹⁴ rounds to multiples of 2⁻²⁴, halves to even
_STEPS_OF_ONE = np.float32(1.5 * 2**23)  # adding it to less than 2²² rounds to whole numbers, halves to even

_ROWS = 16  # rows that a thread takes at once
_COLUMNS = 2048  # and columns in matmul_transposed: the sums of few rows stay in the L2 cache


@jit()
def _scaled(codes: Any, scale: Any, out: Any) -> None:
    for k in range(out.size):
        out[k] = np.float32(codes[k]) * scale * _INVERSE


@jit()
def _decode(codes: Any, scales: Any, group: int, start: int, out: Any) -> None:
    """Columns ``start ...`` of one row to all of ``out``; ``codes`` and ``scales`` are those of the row."""
    k = 0
    while k < out.size:
        index = (start + k) // group
        end = min(out.size, (index + 1) * group - start)
        _scaled(codes[start + k : start + end], scales[index], out[k:end])
        k = end


@jit(parallel=True)
def dequantize(codes: Any, scales: Any, group: int, out: Any) -> None:
    """The rows of ``codes`` to ``out``, fp32, of the same shape."""
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
    """``y = x Ŵᵀ`` for few rows: ``x`` is ``[n, in]``, ``y`` is ``[n, out]``. A row of Ŵ lives in the L1 cache."""
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
def matmul_transposed(codes: Any, scales: Any, group: int, y: Any, sums: Any) -> None:
    """``x = y Ŵ`` for few rows: ``y`` is ``[n, out]``, and ``x`` is the sum of ``sums`` ``[parts, n, in]``.

    Each part has its share of the rows of Ŵ and reads them from one end to the other, as memory likes it. Four
    rows at a time, because loading and storing the sums costs as much as adding to them.
    """
    parts, rows, in_features = sums.shape
    out_features = y.shape[1]
    size = (out_features + parts - 1) // parts
    strips = (in_features + _COLUMNS - 1) // _COLUMNS
    for piece in prange(parts * strips):
        part, start = piece // strips, piece % strips * _COLUMNS
        stop = min(start + _COLUMNS, in_features)
        last = min((part + 1) * size, out_features)
        sums[part, :, start:stop] = 0
        w = np.zeros((4, stop - start), np.float32)
        for o in range(part * size, last, 4):
            four = min(4, last - o)
            for j in range(four):
                _decode(codes[o + j], scales[o + j], group, start, w[j])
            for r in range(rows):  # of what is left in w from the last four, nothing is added
                b = y[r, o + 1] if four > 1 else np.float32(0)
                c = y[r, o + 2] if four > 2 else np.float32(0)
                d = y[r, o + 3] if four > 3 else np.float32(0)
                _add_four(sums[part, r, start:stop], w, y[r, o], b, c, d)


@jit()
def _largest(bits: Any) -> Any:
    """The bits of max |x|. As integers, because their maximum is vectorised, and because NaN is above all of them."""
    largest = np.int32(0)
    for k in range(bits.size):
        largest = max(largest, np.int32(bits[k] & 0x7FFFFFFF))
    return largest


@jit()
def _to_half(x: Any, bits: Any, half: Any, half_bits: Any) -> None:
    """Values below 65520 rounded to fp16, without the instruction for it, which numba doesn't reach."""
    for k in range(bits.size):
        to_even = (bits[k] >> 13) & 1
        half_bits[k] = np.int32((bits[k] + 0xFFF + to_even) & ~0x1FFF)
    for k in range(x.size):
        small = (x[k] + _STEPS_OF_HALF) - _STEPS_OF_HALF
        half[k] = small if abs(x[k]) < _NORMAL else half[k]


@jit()
def _to_codes(x: Any, factor: Any, codes: Any) -> None:
    for k in range(x.size):
        codes[k] = np.int8((x[k] * factor + _STEPS_OF_ONE) - _STEPS_OF_ONE)


@jit()
def _quantize_group(x: Any, x_bits: Any, half: Any, half_bits: Any, codes: Any, c: Any, c_bits: Any) -> None:
    """``c`` and ``c_bits`` are the same single value."""
    c_bits[0] = _largest(x_bits)
    if _FROM <= c[0] < _BELOW:
        _to_half(x, x_bits, half, half_bits)
        c_bits[0] = _largest(half_bits)
        _to_codes(half, _ONE / max(c[0], _SMALLEST) * _LARGEST, codes)
    else:
        _to_codes(x, _ONE / max(c[0], _SMALLEST) * _LARGEST, codes)


@jit(parallel=True)
def quantize(x: Any, group: int, codes: Any, scales: Any) -> None:
    """The fp32 weight ``[out, in]`` to codes and scales: see :func:`modulora_int8.reference.quantize`."""
    out_features, in_features = x.shape
    x_bits, scales_bits = x.view(np.int32), scales.view(np.int32)
    for piece in prange((out_features + _ROWS - 1) // _ROWS):
        half_bits = np.empty(min(group, in_features), np.int32)
        half = half_bits.view(np.float32)
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, out_features)):
            for g in range(scales.shape[1]):
                a, b = g * group, min((g + 1) * group, in_features)
                _quantize_group(
                    x[o, a:b], x_bits[o, a:b], half[: b - a], half_bits[: b - a], codes[o, a:b],
                    scales[o, g : g + 1], scales_bits[o, g : g + 1],
                )  # fmt: skip
