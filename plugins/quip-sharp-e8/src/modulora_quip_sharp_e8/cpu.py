"""QuIP#'s packed codes on the CPU, compiled by numba: the bits of :func:`modulora_quip_sharp_e8.codebooks.decode`, and products.

In all kernels ``codes`` are int16 ``[rows, blocks]``, a code for eight columns, and ``residual`` is uint8 ``[rows, blocks]`` at 3
bits, int16 likewise at 4, and at 2 bits not read: pass ``codes``. All arrays are C-contiguous. C is what the codes stand for, fp32, or
rounded to bf16, ``[rows, 8 · blocks]``, in units of the codebook. They are decoded by words of nibbles where the processor permutes bytes
(:mod:`modulora_quip_sharp_e8.cpu_words`), elsewhere by points (:mod:`modulora_quip_sharp_e8.cpu_points`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import STRIP, narrow, on_stack
from modulora_core.kernels.cpu.cpu_kernels import RowKernels
from modulora_quip_sharp_e8.cpu_points import expand_points
from modulora_quip_sharp_e8.cpu_words import (
    expand,
    half_of,
    has_byte_permutations,
    rows_together,
    spell_all,
)

_MOST_CODES = 4096  # that are made words at once

_words = on_stack(2 * half_of.py_func(_MOST_CODES), np.int64)
_last = on_stack(8, np.float32)


@jit(borrows=True)
def _decode_words(
    codes: Any, residual: Any, bits: int, row: int, block: int, columns: int, out: Any
) -> None:
    blocks, step = codes.shape[1], out.shape[1]
    taken, together, words = (columns + 7) // 8, 1, _words()
    if taken == blocks:
        together = max(1, min(rows_together(blocks, STRIP), _MOST_CODES // taken))
    for first in range(0, len(out), together):
        count = min(together, len(out) - first)
        for start in range(0, taken, _MOST_CODES):  # once, but of a row that is longer
            size = min(_MOST_CODES, taken - start)
            spell_all(
                codes, residual, bits, (row + first) * blocks + block + start, count * size, words
            )
            half, wide = half_of(count * size), min(8 * size, columns - 8 * start)
            for r in range(count):
                at = (first + r) * step + 8 * start
                if bits == 2:
                    expand(words, None, r * size // 2, half, wide, out, at)
                else:
                    expand(words, residual, r * size // 2, half, wide, out, at)


@jit(borrows=True)
def _points(codes: Any, residual: Any, bits: int, at: int, count: int, out: Any, to: int) -> None:
    if bits == 2:
        expand_points(codes, None, at, count, out, to)
    else:
        expand_points(codes, residual, at, count, out, to)


@jit(borrows=True)
def _decode_points(
    codes: Any, residual: Any, bits: int, row: int, block: int, columns: int, out: Any
) -> None:
    blocks, step = codes.shape[1], out.shape[1]
    whole = columns // 8
    for r in range(len(out)):
        at = (row + r) * blocks + block
        _points(codes, residual, bits, at, whole, out, r * step)
        if 8 * whole < columns:
            last = _last().reshape(1, 8)
            _points(codes, residual, bits, at + whole, 1, last, 0)
            for k in range(8 * whole, columns):
                out[r, k] = narrow(last[0, k - 8 * whole], out[r, k])


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...``, a multiple of eight, of the rows of C from ``row`` on: see :class:`modulora_core.kernels.cpu.products.RowKernels`.

    ``weight`` is codes, residual and bits.
    """
    codes, residual, bits = weight
    if has_byte_permutations():
        _decode_words(codes, residual, bits, row, start // 8, columns, out)
    else:
        _decode_points(codes, residual, bits, row, start // 8, columns, out)


rows = RowKernels(decode, rounds=True)
"""Tiles and few-row products; for one row there is a faster one in :mod:`modulora_quip_sharp_e8.cpu_one_row`."""
