"""INT8 on the CPU, compiled by numba: the same values as :mod:`modulora_int8.reference`, at the speed of memory.

``codes`` are ``[out, in]``, ``scales`` ``[out, groups]``; ``group`` columns share a scale. The loops that should be
vectorised run over slices of their own, from 0 on: LLVM can't rule out that other indices are negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.products import RowKernels
from modulora_int8.cpu_decode import decode
from modulora_int8.cpu_one_row import matmul_one, takes
from modulora_int8.reference import HALF_RANGE, LARGEST, SMALLEST_ABSMAX

_ONE, _LARGEST = np.float32(1), np.float32(LARGEST)
_SMALLEST = np.float32(SMALLEST_ABSMAX)
_FROM, _BELOW = np.float32(HALF_RANGE[0]), np.float32(HALF_RANGE[1])

_NORMAL = np.float32(
    2**-14
)  # fp16's smallest normal value; below it the step is 2⁻²⁴, above it a mantissa has 10 bits
_STEPS_OF_HALF = np.float32(0.75)  # adding it to less than 2⁻¹⁴ rounds to multiples of 2⁻²⁴, halves to even
_STEPS_OF_ONE = np.float32(1.5 * 2**23)  # adding it to less than 2²² rounds to whole numbers, halves to even

_ROWS = 16  # rows that a thread takes at once


rows = RowKernels(decode, matmul_one, takes)
"""Tiles and few-row products."""


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
