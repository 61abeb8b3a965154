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
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.cpu_vectors import add, load, multiply, multiply_add, spread, store, total

_ROWS = 16  # rows that a thread takes at once
_COLUMNS = 512  # and columns in matmul_transposed, where eight decoded rows of them share the L1 cache with the tables


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


@jit(parallel=True)
def dequantize(codes: Any, residual: Any, bits: int, out: Any) -> None:
    """All of C to ``out``, fp32 ``[rows, columns]``, of which the last block's columns may be fewer than eight."""
    rows, columns = out.shape
    whole = columns // 8
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        last = np.empty(8, np.float32)
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, rows)):
            for j in range(whole):
                store(out, o * columns + 8 * j, _decode(codes, residual, bits, o, j))
            if whole < codes.shape[1]:
                store(last, 0, _decode(codes, residual, bits, o, whole))
                out[o, 8 * whole :] = last[: columns - 8 * whole]


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


@jit()
def _two_times_four(w: Any, rows: int, x: Any, first: int, y: Any, o: int) -> None:
    """``y[first : first + 4, o : o + 2] = x[first : first + 4] wᵀ`` of ``w``, ``[2, columns]``.

    Rows beyond the last of ``x``, and of ``w`` where it has only one of ``rows``, aren't written.
    """
    last, columns = len(x) - 1, w.shape[1]
    a, b, c, d = first, min(first + 1, last), min(first + 2, last), min(first + 3, last)
    none = spread(np.float32(0))
    sum_a, sum_b, sum_c, sum_d, sum_e, sum_f, sum_g, sum_h = none, none, none, none, none, none, none, none
    for k in range(0, columns, 8):
        one, two = load(w, k), load(w, columns + k)
        x_a, x_b = load(x, a * columns + k), load(x, b * columns + k)
        sum_a, sum_b = multiply_add(one, x_a, sum_a), multiply_add(one, x_b, sum_b)
        sum_e, sum_f = multiply_add(two, x_a, sum_e), multiply_add(two, x_b, sum_f)
        x_c, x_d = load(x, c * columns + k), load(x, d * columns + k)
        sum_c, sum_d = multiply_add(one, x_c, sum_c), multiply_add(one, x_d, sum_d)
        sum_g, sum_h = multiply_add(two, x_c, sum_g), multiply_add(two, x_d, sum_h)
    y[a, o], y[b, o], y[c, o], y[d, o] = total(sum_a), total(sum_b), total(sum_c), total(sum_d)
    if rows > 1:
        y[a, o + 1], y[b, o + 1] = total(sum_e), total(sum_f)
        y[c, o + 1], y[d, o + 1] = total(sum_g), total(sum_h)


@jit(parallel=True)
def matmul(codes: Any, residual: Any, bits: int, x: Any, y: Any) -> None:
    """``y = x Cᵀ`` for few rows: ``x`` is fp32 ``[n, 8 · blocks]``, ``y`` is fp32 ``[n, rows]``.

    The product with one row of ``x`` never stores what it decodes; with more, two rows of C live in the L1 cache.
    """
    rows, columns = y.shape[1], x.shape[1]
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        start, stop = piece * _ROWS, min((piece + 1) * _ROWS, rows)
        if len(x) == 1:
            for o in range(start, stop, 4):
                _four_times_one(codes, residual, bits, o, stop, x, y)
        else:
            w = np.zeros((2, columns), np.float32)
            for o in range(start, stop, 2):
                two = min(2, stop - o)
                for i in range(two):
                    for j in range(codes.shape[1]):
                        store(w, i * columns + 8 * j, _decode(codes, residual, bits, o + i, j))
                for r in range(0, len(x), 4):
                    _two_times_four(w, two, x, r, y, o)


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


@jit()
def _add_eight(w: Any, blocks: int, y: Any, r: int, first: int, last: int, sums: Any, at: int) -> None:
    """``sums[at:] += y[r, first : first + 8] w`` over ``blocks`` blocks; ``w`` is ``[8, columns]``, and rows from ``last`` on count 0."""
    zero, columns = np.float32(0), w.shape[1]
    b_0 = spread(y[r, first])
    b_1 = spread(y[r, first + 1] if first + 1 < last else zero)
    b_2 = spread(y[r, first + 2] if first + 2 < last else zero)
    b_3 = spread(y[r, first + 3] if first + 3 < last else zero)
    b_4 = spread(y[r, first + 4] if first + 4 < last else zero)
    b_5 = spread(y[r, first + 5] if first + 5 < last else zero)
    b_6 = spread(y[r, first + 6] if first + 6 < last else zero)
    b_7 = spread(y[r, first + 7] if first + 7 < last else zero)
    for k in range(0, 8 * blocks, 8):
        value = load(sums, at + k)
        value = multiply_add(load(w, k), b_0, value)
        value = multiply_add(load(w, columns + k), b_1, value)
        value = multiply_add(load(w, 2 * columns + k), b_2, value)
        value = multiply_add(load(w, 3 * columns + k), b_3, value)
        value = multiply_add(load(w, 4 * columns + k), b_4, value)
        value = multiply_add(load(w, 5 * columns + k), b_5, value)
        value = multiply_add(load(w, 6 * columns + k), b_6, value)
        value = multiply_add(load(w, 7 * columns + k), b_7, value)
        store(sums, at + k, value)


@jit(parallel=True)
def matmul_transposed(codes: Any, residual: Any, bits: int, y: Any, sums: Any) -> None:
    """``x = y C`` for few rows: ``y`` is fp32 ``[n, rows]``, and ``x`` is the sum of ``sums``, fp32 ``[parts, n, 8 · blocks]``.

    Each part has its share of the rows of C. The order of a sum doesn't depend on the number of threads.
    """
    parts, n, columns = sums.shape
    rows, blocks = codes.shape
    size = (rows + parts - 1) // parts
    width = min(_COLUMNS // 8, blocks) if n > 1 else blocks
    strips = (blocks + width - 1) // width
    for piece in prange(parts * strips):
        part, start = piece // strips, piece % strips * width
        stop, last = min(start + width, blocks), min((part + 1) * size, rows)
        sums[part, :, 8 * start : 8 * stop] = 0
        if n == 1:
            for o in range(part * size, last, 4):
                _add_one(codes, residual, bits, o, last, y, start, stop, sums, part * columns)
        else:
            w = np.zeros((8, 8 * width), np.float32)
            for o in range(part * size, last, 8):
                for i in range(min(8, last - o)):
                    for j in range(start, stop):
                        store(w[i], 8 * (j - start), _decode(codes, residual, bits, o + i, j))
                for r in range(n):
                    _add_eight(w, stop - start, y, r, o, last, sums, (part * n + r) * columns + 8 * start)
