"""QuIP#'s packed codes on the CPU, compiled by numba: the bits of :func:`modulora_quip_sharp_e8.codebooks.decode`, and products.

In all kernels ``codes`` are int16 ``[rows, blocks]``, a code for eight columns, and ``residual`` is uint8 ``[rows, blocks]`` at 3
bits, int16 likewise at 4, and at 2 bits not read: pass ``codes``. All arrays are C-contiguous. C is what the codes stand for, fp32
``[rows, 8 · blocks]``, in units of the codebook. A point of E8P12 is one row of a table by its vector, times one by its signs, plus
±1/4: exact in any order. The tables stay in the L1 cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.products import RowKernels
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.cpu_vectors import add, load, multiply, multiply_add, spread, store, total

_ROWS = 16  # rows that a thread takes at once


def _tables() -> tuple[Any, Any, Any]:
    """``vectors[code >> 8] * signs[code & 255] + shift[code & 255]`` is the point: fp32 ``[256, 8]`` twice and ``[256]``."""
    points = codebooks.e8p().numpy()
    shift = np.float32(0.25) - np.float32(0.5) * np.array([i.bit_count() & 1 for i in range(256)], np.float32)
    signs = np.sign(points[:256] - shift[:, None])  # vector 0 is (1/2)⁸
    vectors = points[::256] - shift[0]  # signs 0 are none
    return np.ascontiguousarray(vectors), np.ascontiguousarray(signs), shift


_VECTORS, _SIGNS, _SHIFT = _tables()
_E81 = codebooks.e81().numpy()
_STEPS = np.array([codebooks.residual_step(bits) if bits > 2 else 0 for bits in range(5)], np.float32)


@jit()
def _point(code: int) -> Any:
    """The point of the E8P12 code that int16 ``code`` holds."""
    vector, signs = np.int64(code) >> 8 & 255, np.int64(code) & 255
    return multiply_add(load(_VECTORS, 8 * vector), load(_SIGNS, 8 * signs), spread(_SHIFT[signs]))


@jit()
def _decode(codes: Any, residual: Any, bits: int, o: int, j: int) -> Any:
    """C of row ``o``, columns ``8 j`` to ``8 j + 7``."""
    value = _point(codes[o, j])
    if bits == 2:
        return value
    left = load(_E81, 8 * np.int64(residual[o, j])) if bits == 3 else _point(residual[o, j])
    return add(value, multiply(left, spread(_STEPS[bits])))


@jit()
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...``, a multiple of eight, of the rows of C from ``row`` on: see :class:`modulora_core.kernels.products.RowKernels`.

    ``weight`` is codes, residual and bits.
    """
    codes, residual, bits = weight
    block, whole = start // 8, columns // 8
    step = out.shape[1]
    for r in range(len(out)):
        for j in range(whole):
            store(out, r * step + 8 * j, _decode(codes, residual, bits, row + r, block + j))
        if 8 * whole < columns:
            last = np.empty(8, np.float32)
            store(last, 0, _decode(codes, residual, bits, row + r, block + whole))
            for k in range(8 * whole, columns):
                out[r, k] = last[k - 8 * whole]


rows = RowKernels(decode)
"""Tiles and few-row products; for one row there is a faster one below, as decoding is what it costs."""


@jit()
def _four_times_one(codes: Any, residual: Any, bits: int, first: int, last: int, x: Any, y: Any) -> None:
    """``y[0, first : first + 4] = C xᵀ`` for one row of ``x``; of the four rows of C those from ``last`` on aren't written."""
    a, b, c, d = first, min(first + 1, last - 1), min(first + 2, last - 1), min(first + 3, last - 1)
    none = spread(np.float32(0))
    sum_a, sum_b, sum_c, sum_d = none, none, none, none
    for j in range(codes.shape[1]):
        eight = load(x, 8 * j)
        sum_a = multiply_add(_decode(codes, residual, bits, a, j), eight, sum_a)
        sum_b = multiply_add(_decode(codes, residual, bits, b, j), eight, sum_b)
        sum_c = multiply_add(_decode(codes, residual, bits, c, j), eight, sum_c)
        sum_d = multiply_add(_decode(codes, residual, bits, d, j), eight, sum_d)
    y[0, a], y[0, b], y[0, c], y[0, d] = total(sum_a), total(sum_b), total(sum_c), total(sum_d)


@jit(parallel=True)
def matmul_one(codes: Any, residual: Any, bits: int, x: Any, y: Any) -> None:
    """``y = x Cᵀ`` for one row: ``x`` is fp32 ``[1, 8 · blocks]``, ``y`` is fp32 ``[1, rows]``. What is decoded is never stored."""
    rows = y.shape[1]
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        stop = min((piece + 1) * _ROWS, rows)
        for o in range(piece * _ROWS, stop, 4):
            _four_times_one(codes, residual, bits, o, stop, x, y)


@jit()
def _add_one(
    codes: Any, residual: Any, bits: int, first: int, last: int, y: Any, start: int, stop: int, sums: Any, at: int
) -> None:  # fmt: skip
    """Add ``y[0, first : first + 4] C[first : first + 4]`` to ``sums[at:]``, blocks ``[start, stop)``; rows from ``last`` on count 0."""
    zero = np.float32(0)
    a, b, c, d = first, min(first + 1, last - 1), min(first + 2, last - 1), min(first + 3, last - 1)
    y_a, y_b = spread(y[0, a]), spread(y[0, b] if b > a else zero)
    y_c, y_d = spread(y[0, c] if c > b else zero), spread(y[0, d] if d > c else zero)
    for j in range(start, stop):
        value = load(sums, at + 8 * j)
        value = multiply_add(_decode(codes, residual, bits, a, j), y_a, value)
        value = multiply_add(_decode(codes, residual, bits, b, j), y_b, value)
        value = multiply_add(_decode(codes, residual, bits, c, j), y_c, value)
        value = multiply_add(_decode(codes, residual, bits, d, j), y_d, value)
        store(sums, at + 8 * j, value)


@jit(parallel=True)
def matmul_one_transposed(codes: Any, residual: Any, bits: int, y: Any, sums: Any) -> None:
    """``x = y C`` for one row: ``y`` is fp32 ``[1, rows]``, and ``x`` is the sum of ``sums``, fp32 ``[parts, 8 · blocks]``.

    Each part has its share of the rows of C. The order of a sum doesn't depend on the number of threads.
    """
    parts, columns = sums.shape
    rows, blocks = codes.shape
    size = (rows + parts - 1) // parts
    for part in prange(parts):
        last = min((part + 1) * size, rows)
        sums[part] = 0
        for o in range(part * size, last, 4):
            _add_one(codes, residual, bits, o, last, y, 0, blocks, sums, part * columns)
