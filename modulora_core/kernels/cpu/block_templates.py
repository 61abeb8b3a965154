"""Products of up to 512 rows with blocks of sums, which are compiled once for each decoder, in the place of :func:`decode` here.

    blocks              Y = X Ŵᵀ      Xᵀ is cut into panels; for each piece of Ŵ's rows, for each part of its columns:
                                      decode;  sums += Ŵ[piece, part] · Xᵀ[part];  at last  Y[:, piece] = sumsᵀ
    blocks_transposed   X = Y Ŵ       Y is cut into parts; for each piece of Ŵ's columns, for each few of its rows:
                                      decode;  for some of Y's rows at a time:  sums += Y[:, few] · Ŵ[few, piece];
                                      at last  X[:, piece] = sums

What is decoded, and the sums that it is added to, stay in the L2 cache, where a tile is written to memory and read again. For n rows
and a weight of ``out · in`` values of b bits, ``out · in · b / 8`` bytes are read from memory once, and X or Y once for each piece.
``2 n · out · in`` operations are done, which is the floor, beside those of decoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.block_loops import (
    DEPTH,
    PART,
    ROW,
    RUN,
    add_block,
    block_columns,
    block_rows,
    put_transposed,
    square,
)
from modulora_core.kernels.cpu.product_templates import GAP, decode
from modulora_core.kernels.cpu.scratch import scratch
from modulora_core.kernels.cpu.shares import share, signed

CHUNK = 2048
"""Terms of a sum whose factors of X are in memory once more, in the order in which they are read: 4 MiB at once."""

TALL = 252
"""Rows of Ŵ whose :data:`PART` columns a thread has decoded at once, at most: half a MiB, as much as their sums with all rows of X."""

WIDE = 256
"""Columns of Ŵ of which a thread has decoded :data:`DEPTH` rows, at most: a quarter of a MiB, and their sums half a one."""

HIGH = 84
"""Rows of Y whose terms stay in the L2 cache while all that is decoded is multiplied by them, 84 KiB: a multiple of any
:func:`block_rows`. All rows at once, with their sums and what is decoded, left too little of that cache."""

BETWEEN = GAP // 4  # numbers between two rows of sums, as for decoded ones
_PIECE = 16  # rows that a thread copies at once


@jit()
def whole_units(count: int, unit: int) -> int:
    return (count + unit - 1) // unit * unit


@jit()
def most_units(units: int, budget: int, numbers: int) -> Any:
    """How many of so many units, of so many fp32 numbers each, the budget has room for: one at least."""
    return max(1, min(units, budget // (4 * numbers)))


@jit()
def pieces_of(units: int, most: int, threads: int) -> Any:
    """Into how many pieces to cut so many units: each has ``most`` at most, and all threads have equally many pieces."""
    return min(units, whole_units((units + most - 1) // most, threads))


@jit(borrows=True)
def _put_panel(x: Any, first: int, count: int, start: int, size: int, out: Any, to: int) -> None:
    """``out[to + k, r] = x[first + r, start + k]``, and 0 where there is no such row."""
    side = square()
    rows, columns = count // side * side, size // side * side
    for r in range(0, rows, side):
        for k in range(0, columns, side):
            put_transposed(x, first + r, start + k, out, to + k, r)
    for k in range(size):
        for r in range(rows if k < columns else 0, out.shape[1]):
            out[to + k, r] = x[first + r, start + k] if r < count else np.float32(0)


@jit(borrows=True)
def _put_part(y: Any, row: int, start: int, size: int, out: Any, to: int) -> None:
    """``out[to, k] = y[row, start + k]``, and 0 where there is no such row."""
    if row < len(y):
        for k in range(size):
            out[to, k] = y[row, start + k]
    else:
        out[to, :size] = 0


@jit()
def put_sums(sums: Any, rows: int, y: Any, start: int, add: bool) -> None:
    """``y[r, start + o] = sums[o, r]`` for all of ``rows`` rows of sums, or added."""
    side = square()
    part = scratch(side, side, np.float32)
    for r in range(0, len(y), side):
        for o in range(0, rows, side):
            high, wide = min(side, len(y) - r), min(side, rows - o)
            if high == side and wide == side and not add:
                put_transposed(sums, o, r, y, r, start + o)
            else:
                put_transposed(sums, o, r, part, 0, 0)
                for i in range(high):
                    for k in range(wide):
                        y[r + i, start + o + k] = part[i, k] + (
                            y[r + i, start + o + k] if add else np.float32(0)
                        )


@jit(borrows=True)
def put_rows(sums: Any, x: Any, start: int, columns: int, add: bool) -> None:
    """``x[:, start : start + columns] = sums[:, :columns]``, or added."""
    for r in range(len(x)):
        if add:
            for k in range(columns):
                x[r, start + k] += sums[r, k]
        else:
            for k in range(columns):
                x[r, start + k] = sums[r, k]


def blocks(weight: Any, threads: int, budget: int, x: Any, y: Any) -> None:
    """``x``, fp32 ``[n, in]``, and ``y``, fp32 ``[n, out]``, are C-contiguous; ``budget``: bytes of Ŵ that a thread may decode at once."""
    n, columns = x.shape
    tall, wide = block_rows(), block_columns()
    panels, strips = (n + wide - 1) // wide, (y.shape[1] + tall - 1) // tall
    pieces = pieces_of(strips, most_units(TALL // tall, budget, tall * ROW), threads)
    for start in range(0, columns, CHUNK):
        size = min(CHUNK, columns - start)
        packed = scratch(panels * size, wide, np.float32)
        for index in prange(panels):
            panel = signed(index)
            _put_panel(
                x, panel * wide, min(wide, n - panel * wide), start, size, packed, panel * size
            )
        for index in prange(pieces):
            begin, stop = share(index, pieces, y.shape[1], tall)
            rows = stop - begin
            whole = whole_units(rows, tall)
            w = scratch(whole, ROW, np.float32)
            w[rows:] = 0
            sums = scratch(whole_units(whole, square()), panels * wide + BETWEEN, np.float32)
            sums[:] = 0
            for part in range(0, size, PART):
                decode(weight, begin, start + part, min(PART, size - part), w[:rows])
                for at in range(part, min(part + PART, size), DEPTH):
                    depth = min(DEPTH, size - at)
                    ahead = (
                        depth * wide * tall // whole
                    )  # of the panel that comes then, for each strip
                    for panel in range(panels):
                        here = panel * size + at
                        then = here + size if panel + 1 < panels else at + DEPTH
                        for row in range(0, whole, tall):
                            add_block(w, row, at - part, packed, here, 0, depth, sums, row, panel * wide,
                                      packed, then * wide + row // tall * ahead, RUN)  # fmt: skip
            put_sums(sums, rows, y, begin, start > 0)


def blocks_transposed(weight: Any, threads: int, budget: int, y: Any, x: Any) -> None:
    """``y``, fp32 ``[n, out]``, and ``x``, fp32 ``[n, in]``, are C-contiguous; ``budget`` as above."""
    n, rows = y.shape
    tall, wide = block_rows(), block_columns()
    whole, panels = whole_units(n, tall), (x.shape[1] + wide - 1) // wide
    pieces = pieces_of(panels, most_units(WIDE // wide, budget, wide * DEPTH), threads)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        packed = scratch((size + PART - 1) // PART * whole, ROW, np.float32)
        for index in prange((whole + _PIECE - 1) // _PIECE):
            first = signed(index) * _PIECE
            for r in range(first, min(whole, first + _PIECE)):
                for part in range(0, size, PART):
                    _put_part(
                        y, r, start + part, min(PART, size - part), packed, part // PART * whole + r
                    )
        for index in prange(pieces):
            begin, stop = share(index, pieces, x.shape[1], wide)
            columns = stop - begin
            width = whole_units(columns, wide)
            w = scratch(DEPTH, width + BETWEEN, np.float32)
            w[:, columns:width] = 0
            sums = scratch(whole, width + BETWEEN, np.float32)
            sums[:] = 0
            for at in range(0, size, DEPTH):
                depth, part, later = min(DEPTH, size - at), at // PART, at + DEPTH
                decode(weight, start + at, begin, columns, w[:depth])
                for first in range(0, whole, HIGH):
                    last = min(first + HIGH, whole)
                    # the next rows, or the first ones' next terms, of which each block asks for two rows
                    then = (part * whole + last) * ROW + at % PART
                    if last == whole:
                        then = later // PART * whole * ROW + later % PART
                    ahead = 0
                    for column in range(0, width, wide):
                        for row in range(first, last, tall):
                            add_block(packed, part * whole + row, at % PART, w, 0, column, depth, sums, row, column,
                                      packed, then + ahead * ROW, ROW)  # fmt: skip
                            ahead = ahead + 2 if ahead + 2 < last - first else 0
            put_rows(sums, x, begin, columns, start > 0)
