"""Products of up to 512 rows by blocks of sums, compiled once for each decoder.

    forward      Y = X Ŵᵀ    Xᵀ is cut into panels; for each piece of the rows of Ŵ,
                             for each part of its columns: decode;
                             sums += Ŵ[piece, part] · Xᵀ[part];
                             at last  Y[:, piece] = sumsᵀ
    transposed   X = Y Ŵ     Y is cut into parts; for each piece of the columns of Ŵ,
                             for each few of its rows: decode;  sums += Y[:, few] · Ŵ[few, piece];
                             at last  X[:, piece] = sums

Each loaded vector takes part in many multiplications, so that these bind the product (Goto and van
de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008). Decoded values and their sums
stay in the L2 cache; a tile would be written to memory and read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels.cpu.memory import scratch, share, signed
from modulora_core.kernels.cpu.products import GAP, decode
from modulora_core.kernels.cpu.sums import (
    WIDTH,
    add_block,
    add_multiples,
    columns_of_two_rows,
    store_transposed,
    zeros,
)
from modulora_core.kernels.cpu.vectors import has
from modulora_core.kernels.loading import jit

TALL = 14 if has("avx512f") or has("neon") else 6
"""Rows of a block of sums: with two vectors and a number it fits into 32 registers, or 16."""

WIDE = 2 * WIDTH
"""Columns of a block."""

DEPTH = 256
"""Terms that are added in registers: their panel, 32 KiB, stays in the L1 cache."""

PART = 2 * DEPTH
"""Terms that are decoded at once."""

ROW = PART + 16
"""Numbers from one row of A to the next, a constant in the instruction that loads."""

CHUNK = 2048
"""Terms whose factors of X are copied at once, in the order in which they are read."""

MOST_ROWS, MOST_COLUMNS = 252, 256
"""Rows of Ŵ, and columns when transposed, of which a thread has a part decoded."""

HIGH = 84
"""Rows of Y whose terms stay in the L2 cache: a multiple of TALL."""

TURN = 8
"""Terms in one turn of the loop: counting and comparing for each took a sixteenth of the time."""

BETWEEN = GAP // 4  # numbers between two rows of sums
_PIECE = 16  # rows that a thread copies at once

_nothing, _two = zeros(TALL, 2), columns_of_two_rows(2)


@jit(borrows=True)
def _add_block(a: Any, at_a: int, b: Any, at_b: int, depth: int, sums: Any, at: int) -> None:
    """``sums += A B`` of one block; rows of A are :data:`ROW` numbers apart."""
    block, length = _nothing(), b.shape[1]
    whole = depth // TURN * TURN
    for k in range(0, whole, TURN):
        for j in range(TURN):
            row = _two(b, at_b + (k + j) * length, 0)
            block = add_multiples(a, at_a + k + j, ROW, row, block)
    for k in range(whole, depth):
        block = add_multiples(a, at_a + k, ROW, _two(b, at_b + k * length, 0), block)
    add_block(a, sums, at, sums.shape[1], block)


@jit()
def units(count: int, unit: int) -> int:
    """How many units hold so many."""
    return (count + unit - 1) // unit


@jit()
def pieces_of(count: int, unit: int, most: int, unit_bytes: int, budget: int, threads: int) -> Any:
    """Into how many pieces of whole units to cut a side of Ŵ, as many for each thread.

    A piece has ``most`` rows or columns at most, and is decoded within the budget, or has one unit.
    """
    together = max(1, min(most // unit, budget // unit_bytes))
    return min(units(count, unit), units(units(units(count, unit), together), threads) * threads)


@jit(borrows=True)
def transpose(
    a: Any, row: int, column: int, rows: int, columns: int, b: Any, to_row: int, to_column: int
) -> None:
    """``b[to_row + k, to_column + r] = a[row + r, column + k]``, for fp32."""
    long, step = a.shape[1], b.shape[1]
    high, wide = rows // WIDTH * WIDTH, columns // WIDTH * WIDTH
    for k in range(0, wide, WIDTH):
        for r in range(0, high, WIDTH):
            at, to = (row + r) * long + column + k, (to_row + k) * step + to_column + r
            store_transposed(a, at, long, b, to, step)
    for k in range(columns):
        for r in range(high if k < wide else 0, rows):
            b[to_row + k, to_column + r] = a[row + r, column + k]


@jit(borrows=True)
def add_columns(sums: Any, y: Any, start: int, count: int, room: Any) -> None:
    """``y[:, start + o] += sums[o]``, for ``count`` rows; ``room`` is scratch, ``[n, WIDTH]``."""
    for o in range(0, count, WIDTH):
        wide = min(WIDTH, count - o)
        transpose(sums, o, 0, wide, len(y), room, 0, 0)
        for r in range(len(y)):
            for k in range(wide):
                y[r, start + o + k] += room[r, k]


@jit(borrows=True)
def add_to_columns(sums: Any, x: Any, start: int, count: int) -> None:
    """``x[:, start + k] += sums[:, k]`` for ``count`` columns of sums."""
    for r in range(len(x)):
        for k in range(count):
            x[r, start + k] += sums[r, k]


def forward(weight: Any, threads: int, budget: int, x: Any, y: Any) -> None:
    """Add ``x Ŵᵀ`` to ``y``; ``budget`` limits the bytes of Ŵ that a thread has decoded."""
    n, columns = x.shape
    panels, rows = units(n, WIDE), y.shape[1]
    pieces = pieces_of(rows, TALL, MOST_ROWS, TALL * ROW * 4, budget, threads)
    for start in range(0, columns, CHUNK):
        size = min(CHUNK, columns - start)
        packed = scratch(panels * size, WIDE, np.float32)
        for index in prange(panels):
            panel = signed(index)
            first = panel * WIDE
            count = min(WIDE, n - first)
            packed[panel * size : (panel + 1) * size, count:] = 0
            transpose(x, first, start, count, size, packed, panel * size, 0)
        for index in prange(pieces):
            begin, stop = share(index, pieces, rows, TALL)
            whole = units(stop - begin, TALL) * TALL
            w = scratch(whole, ROW, np.float32)
            w[stop - begin :] = 0
            sums = scratch(whole, panels * WIDE + BETWEEN, np.float32)
            sums[:] = 0
            for part in range(0, size, PART):
                decode(weight, begin, start + part, min(PART, size - part), w[: stop - begin])
                for at in range(part, min(part + PART, size), DEPTH):
                    depth = min(DEPTH, size - at)
                    for panel in range(panels):
                        for row in range(0, whole, TALL):
                            to = row * sums.shape[1] + panel * WIDE
                            at_x = (panel * size + at) * WIDE
                            _add_block(w, row * ROW + at - part, packed, at_x, depth, sums, to)
            add_columns(sums, y, begin, stop - begin, scratch(n, WIDTH, np.float32))


def transposed(weight: Any, threads: int, budget: int, y: Any, x: Any) -> None:
    """Add ``y Ŵ`` to ``x``, for fp32 ``[n, out]`` and ``[n, in]``; ``budget`` as above."""
    n, rows = y.shape
    whole, columns = units(n, TALL) * TALL, x.shape[1]
    pieces = pieces_of(columns, WIDE, MOST_COLUMNS, WIDE * DEPTH * 4, budget, threads)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        packed = scratch(units(size, PART) * whole, ROW, np.float32)
        for index in prange(units(whole, _PIECE)):
            first = signed(index) * _PIECE
            for r in range(first, min(whole, first + _PIECE)):
                for part in range(0, size, PART):
                    out = packed[part // PART * whole + r, : min(PART, size - part)]
                    if r < n:
                        out[:] = y[r, start + part : start + part + out.size]
                    else:
                        out[:] = 0
        for index in prange(pieces):
            begin, stop = share(index, pieces, columns, WIDE)
            width = units(stop - begin, WIDE) * WIDE
            w = scratch(DEPTH, width + BETWEEN, np.float32)
            w[:, stop - begin :] = 0
            sums = scratch(whole, width + BETWEEN, np.float32)
            sums[:] = 0
            for at in range(0, size, DEPTH):
                depth, part = min(DEPTH, size - at), at // PART * whole
                decode(weight, start + at, begin, stop - begin, w[:depth])
                for first in range(0, whole, HIGH):
                    for column in range(0, width, WIDE):
                        for row in range(first, min(first + HIGH, whole), TALL):
                            at_y, to = (part + row) * ROW + at % PART, row * sums.shape[1] + column
                            _add_block(packed, at_y, w, column, depth, sums, to)
            add_to_columns(sums, x, begin, stop - begin)
