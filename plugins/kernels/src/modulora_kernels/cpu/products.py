"""Products of few rows, compiled once for each decoder: it replaces :func:`decode` here.

    forward      Y = X Ŵᵀ    for each strip of rows of Ŵ, for each chunk of columns: decode;
                             for each panel of columns: sums += X[:, panel] · strip[:, panel]ᵀ
    transposed   X = Y Ŵ     for each part of the rows of Ŵ, for each chunk of columns,
                             for each strip: decode; for each panel of columns:
                             sums[part] += Y[:, strip] · strip[:, panel]

Strips stay in the L1 and L2 caches, and sums in registers for a panel. Memory delivers out · in · b
/ 8 bytes once, for b bits a weight. The sums take 2 n · out · in operations for n rows, in fp32, or
in bf16 with fp32 sums.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from modulora_kernels.compiled import jit
from modulora_kernels.cpu.memory import scratch, share, signed
from modulora_kernels.cpu.numbers import narrow_row
from modulora_kernels.cpu.sums import (
    WIDTH,
    add_block,
    add_multiples,
    add_products,
    add_sums_of_lanes,
    columns_of_two_rows,
    pair,
    registers,
    zeros,
)
from modulora_kernels.launching import PARTIAL_SUMS

ROWS = 4
"""Rows of X, or of Y, in a block of sums."""

STRIP = 16
"""Rows of Ŵ that are decoded at once."""

TALL_STRIP = 32
"""Rows of Ŵ that a transposed product decodes at once, in fp32; twice as many of bf16."""

CHUNK = 2048
"""Columns that are decoded at once: memory is read faster in long rows."""

PANEL = 512
"""Columns that all rows of X are multiplied by at once: 32 KiB of a strip."""

SUMS = 2**14
"""Sums of a transposed product that are added to at once, 64 KiB, or one panel."""

GAP = 64
"""Bytes between two decoded rows: rows a power of two apart would share lines of the L1 cache."""

SCRATCH = 4096
"""fp32 values that are decoded before they are rounded to bf16."""

COLUMNS = 64
"""Columns are padded to a multiple of this."""

_PIECE = 16  # rows that a thread takes at once

_BESIDE = (
    WIDTH // ROWS
)  # rows of Ŵ in a block of sums: a block has as many registers as a register has numbers
_ACROSS = 4 if WIDTH == 16 else 2  # registers of columns in a row of a transposed block
_four_rows, _one_row = registers(ROWS), registers(1)
_beside_four, _beside_one = registers(_BESIDE), registers(WIDTH)
_sums_of_four, _sums_of_one = zeros(ROWS, _BESIDE), zeros(1, WIDTH)
_columns = columns_of_two_rows(_ACROSS)
_rows_of_four, _row_of_one = zeros(ROWS, _ACROSS), zeros(1, _ACROSS)


def decode(weight, row, start, columns, out):
    """A placeholder: the compiled functions below call a plugin's decoder in its place."""
    raise NotImplementedError


def fill(weight, first, out):
    """Decode rows of Ŵ, from ``first`` on, into all rows of ``out``."""
    for piece in prange((len(out) + _PIECE - 1) // _PIECE):
        start = signed(piece) * _PIECE
        decode(weight, first + start, 0, out.shape[1], out[start : min(start + _PIECE, len(out))])


def rounded(weight, row, start, columns, out):
    """Decode into fp32 scratch, and round to bf16."""
    width = max(1, min(CHUNK, columns))
    together = min(len(out), SCRATCH // width)
    w = np.empty((together, width), np.float32)
    for first in range(0, len(out), together):
        count = min(together, len(out) - first)
        for at in range(0, columns, width):
            size = min(width, columns - at)
            decode(weight, row + first, start + at, size, w[:count])
            for r in range(count):
                narrow_row(w[r, :size], out[first + r, at : at + size])


@jit(borrows=True)
def _add_four(x, at_x, w, start, count, columns, sums, at):
    """Add products of four rows of x with ``count`` rows of w, over ``columns`` from ``start``.

    Each block of sums is a register of ``sums``, row after row of x.
    """
    for o in range(0, count, _BESIDE):
        block, at_w = _sums_of_four(), o * w.shape[1] + start
        for k in range(0, columns, WIDTH * pair(x)):
            rows = _four_rows(x, at_x + k, x.shape[1])
            block = add_products(rows, _beside_four(w, at_w + k, w.shape[1]), block)
        add_sums_of_lanes(block, sums, at + o * ROWS)


@jit(borrows=True)
def _add_one(x, at_x, w, start, count, columns, sums, at):
    """Add products of one row of x, as :func:`_add_four` does of four."""
    for o in range(0, count, WIDTH):
        block, at_w = _sums_of_one(), o * w.shape[1] + start
        for k in range(0, columns, WIDTH * pair(x)):
            row = _one_row(x, at_x + k, 0)
            block = add_products(row, _beside_one(w, at_w + k, w.shape[1]), block)
        add_sums_of_lanes(block, sums, at + o)


@jit(borrows=True)
def _put_sums(sums, rows, count, y, first):
    """Write the sums of :func:`_add_four` to ``count`` columns of ``y``."""
    flat = sums.reshape(sums.size)
    for r in range(0, rows, ROWS):
        for o in range(0, count, _BESIDE):
            at, wide = r * STRIP + o * ROWS, min(_BESIDE, count - o)
            for i in range(ROWS):
                for k in range(wide):
                    y[r + i, first + o + k] = flat[at + i * _BESIDE + k]


def forward(weight, threads, columns, x, y):
    """``y = x Ŵᵀ``; Ŵ has ``columns``, and ``x`` is padded to a multiple of :data:`COLUMNS`."""
    n, rows = y.shape
    padded, whole = x.shape[1], n // ROWS * ROWS
    chunk, panel = min(CHUNK, padded), PANEL * pair(x)
    for index in prange(threads):
        begin, stop = share(index, threads, rows, STRIP)
        w = scratch(STRIP, chunk + GAP // x.itemsize, x.dtype)
        sums = scratch(n, STRIP, np.float32)
        for first in range(begin, stop, STRIP):
            count = min(STRIP, stop - first)
            sums[:] = 0
            for start in range(0, columns, chunk):
                size, width = min(chunk, columns - start), min(chunk, padded - start)
                w[:, size:width] = 0
                decode(weight, first, start, size, w[:count])
                for at in range(0, width, panel):
                    part, at_x = min(panel, width - at), start + at
                    for r in range(0, whole, ROWS):
                        _add_four(x, r * padded + at_x, w, at, count, part, sums, r * STRIP)
                    for r in range(whole, n):
                        _add_one(x, r * padded + at_x, w, at, count, part, sums, r * STRIP)
            _put_sums(sums, whole, count, y, first)
            y[whole:, first : first + count] = sums[whole:, :count]


@jit(borrows=True)
def _add_rows_of_four(y, at_y, w, at_w, terms, width, sums, at):
    """Add rows of w, times numbers of four rows of y, to ``width`` columns of ``sums``."""
    length, turns = w.shape[1], terms >> 2
    for column in range(0, width, _ACROSS * WIDTH):
        block, here = _rows_of_four(), at_w + column
        for turn in range(turns):  # to count and compare for each term takes the multipliers' time
            for j in range(4 // pair(y)):
                k = 4 * turn + j * pair(y)
                columns = _columns(w, here + k * length, length)
                block = add_multiples(y, at_y + k, y.shape[1], columns, block)
        for k in range(4 * turns, terms, pair(y)):
            columns = _columns(w, here + k * length, length)
            block = add_multiples(y, at_y + k, y.shape[1], columns, block)
        add_block(y, sums, at + column, sums.shape[1], block)


@jit(borrows=True)
def _add_rows_of_one(y, at_y, w, at_w, terms, width, sums, at):
    """Add as :func:`_add_rows_of_four` does, for one row of y."""
    length = w.shape[1]
    for column in range(0, width, _ACROSS * WIDTH):
        block = _row_of_one()
        for k in range(0, terms, pair(y)):
            columns = _columns(w, at_w + column + k * length, length)
            block = add_multiples(y, at_y + k, 0, columns, block)
        add_block(y, sums, at + column, 0, block)


@jit(borrows=True)
def _add_parts(sums, n, row, out):
    """Add the sums of all parts, in order, to give one row of the result."""
    out[:] = 0
    for part in range(PARTIAL_SUMS):
        for k in range(out.size):
            out[k] += sums[part * n + row, k]


def transposed(weight, threads, rows, y, x):
    """``x = y Ŵ``; Ŵ has ``rows``, and ``y`` is padded to a multiple of :data:`COLUMNS`.

    The rows of Ŵ are cut into parts, and each part has sums of its own.
    """
    n, columns = x.shape
    padded = (columns + COLUMNS - 1) // COLUMNS * COLUMNS
    sums = scratch(PARTIAL_SUMS * n, padded, np.float32)
    rows_of_part = (rows + PARTIAL_SUMS - 1) // PARTIAL_SUMS
    rows_of_part += rows_of_part % 2  # bf16 is multiplied in pairs of rows
    strip = TALL_STRIP * pair(y)
    chunk = min(CHUNK, max(PANEL, SUMS // n // PANEL * PANEL), padded)
    chunks = (padded + chunk - 1) // chunk
    whole = n // ROWS * ROWS
    for index in prange(threads):
        w = scratch(strip, chunk + GAP // y.itemsize, y.dtype)
        for piece in range(*share(index, threads, PARTIAL_SUMS * chunks)):
            part, start = piece // chunks, piece % chunks * chunk
            size, width = min(chunk, columns - start), min(chunk, padded - start)
            sums[part * n : (part + 1) * n, start : start + width] = 0
            w[:, size:width] = 0
            last = min((part + 1) * rows_of_part, rows)
            for first in range(part * rows_of_part, last, strip):
                count = min(strip, last - first)
                decode(weight, first, start, size, w[:count])
                if count % 2:
                    w[count] = 0
                for at in range(0, width, PANEL):
                    of_panel, to = min(PANEL, width - at), part * n * padded + start + at
                    for r in range(0, whole, ROWS):
                        at_y, at_sums = r * y.shape[1] + first, to + r * padded
                        _add_rows_of_four(y, at_y, w, at, count, of_panel, sums, at_sums)
                    for r in range(whole, n):
                        at_y, at_sums = r * y.shape[1] + first, to + r * padded
                        _add_rows_of_one(y, at_y, w, at, count, of_panel, sums, at_sums)
    for r in prange(n):
        _add_parts(sums, n, signed(r), x[r])
