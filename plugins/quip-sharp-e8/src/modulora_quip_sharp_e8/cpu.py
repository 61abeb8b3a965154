"""QuIP#'s packed codes on the CPU, compiled by numba: the bits of :func:`modulora_quip_sharp_e8.codebooks.decode`, and products.

In all kernels ``codes`` are int16 ``[rows, blocks]``, a code for eight columns, and ``residual`` is uint8 ``[rows, blocks]`` at 3
bits, int16 likewise at 4, and at 2 bits not read: pass ``codes``. All arrays are C-contiguous. C is what the codes stand for, fp32
``[rows, 8 · blocks]``, in units of the codebook. A point of E8P12 is one row of a table by its vector, times one by its signs, plus
±1/4: exact in any order. The tables stay in the L1 cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modulora_core.kernels import jit
from modulora_core.kernels.product_templates import STRIP
from modulora_core.kernels.products import RowKernels
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.cpu_vectors import add, load, multiply, multiply_add, spread, store
from modulora_quip_sharp_e8.cpu_words import expand, half_of, has_byte_permutations, rows_together, spell_all


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
def decode_block(codes: Any, residual: Any, bits: int, o: int, j: int) -> Any:
    """C of row ``o``, columns ``8 j`` to ``8 j + 7``."""
    value = _point(codes[o, j])
    if bits == 2:
        return value
    left = load(_E81, 8 * np.int64(residual[o, j])) if bits == 3 else _point(residual[o, j])
    return add(value, multiply(left, spread(_STEPS[bits])))


@jit()
def _decode_words(codes: Any, residual: Any, bits: int, row: int, block: int, columns: int, out: Any) -> None:
    blocks, step = codes.shape[1], out.shape[1]
    taken = (columns + 7) // 8
    together = rows_together(blocks, STRIP) if taken == blocks else 1
    words = np.empty(2 * half_of(together * taken), np.int64)
    for first in range(0, len(out), together):
        count = min(together, len(out) - first)
        spell_all(codes, residual, bits, (row + first) * blocks + block, count * taken, words)
        half = half_of(count * taken)
        for r in range(count):
            at = (first + r) * step
            if bits == 2:
                expand(words, None, r * taken // 2, half, columns, out, at)
            else:
                expand(words, residual, r * taken // 2, half, columns, out, at)


@jit()
def _decode_blocks(
    codes: Any, residual: Any, bits: int, row: int, block: int, columns: int, out: Any
) -> None:
    whole = columns // 8
    step = out.shape[1]
    for r in range(len(out)):
        for j in range(whole):
            store(out, r * step + 8 * j, decode_block(codes, residual, bits, row + r, block + j))
        if 8 * whole < columns:
            last = np.empty(8, np.float32)
            store(last, 0, decode_block(codes, residual, bits, row + r, block + whole))
            for k in range(8 * whole, columns):
                out[r, k] = last[k - 8 * whole]


@jit()
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...``, a multiple of eight, of the rows of C from ``row`` on: see :class:`modulora_core.kernels.products.RowKernels`.

    ``weight`` is codes, residual and bits.
    """
    codes, residual, bits = weight
    if has_byte_permutations():
        _decode_words(codes, residual, bits, row, start // 8, columns, out)
    else:
        _decode_blocks(codes, residual, bits, row, start // 8, columns, out)


rows = RowKernels(decode)
"""Tiles and few-row products; for one row there is a faster one in :mod:`modulora_quip_sharp_e8.cpu_one_row`."""
