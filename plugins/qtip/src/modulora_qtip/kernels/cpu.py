"""QTIP's kernels on a CPU, by numba: tiles of C, and products with C.

``strings`` are int16 ``[inputs / 16, outputs / 16, 16 K]``, the bit strings of tiles; ``twice`` is
2 K.
"""

from __future__ import annotations

from modulora_kernels.cpu import CPUKernels, jit, store

from modulora_qtip.kernels import one_row
from modulora_qtip.kernels.decoding import (
    TOGETHER,
    code_of,
    copy_tiles,
    high_column,
    lanes_of,
    line_of,
    low_column,
    pair,
    shifts_of,
    step_of,
    walks_of,
    words_of_tiles,
)
from modulora_qtip.trellis import TILE


@jit(borrows=True)
def _put(values, row, start, out):
    if 0 <= row < out.shape[0]:
        store(out, row * out.shape[1] + start, values)


@jit(borrows=True)
def _decode(weight, lanes, row, start, columns, out):
    strings, twice = weight[0], weight[1]
    across, words = strings.shape[1], words_of_tiles()
    shifts, code = shifts_of(twice), code_of(weight)
    for b in range(row // TILE, (row + len(out) + TILE - 1) // TILE):
        for first in range(0, columns // TILE, TOGETHER):
            count = min(TOGETHER, columns // TILE - first)
            copy_tiles(
                strings, (start // TILE + first) * across + b, count, across, twice, words, 0
            )
            for i in range(count):
                at = (first + i) * TILE
                for p in range(8):
                    of = i * line_of(twice) + p * step_of(twice)
                    one, two = pair(words, of, of + 1, shifts, lanes, code)
                    o = b * TILE + p - row
                    _put(low_column(one, two), o, at, out)
                    _put(high_column(one, two), o + 8, at, out)


@jit(borrows=True)
def decode(weight, row, start, columns, out):
    """Columns ``start ...``, multiples of 16, of the rows of C from ``row`` on, for CPUKernels."""
    if weight[1] == 4:
        _decode(weight, None, row, start, columns, out)
    else:
        _decode(weight, lanes_of(weight[1]), row, start, columns, out)


_kernels = CPUKernels(decode, walks_of)
tile, multiply = _kernels.tile, _kernels.product
product_of_one = one_row.product
