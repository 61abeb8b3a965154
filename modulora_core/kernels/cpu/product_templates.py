"""The loops of :mod:`modulora_core.kernels.cpu.products`, which are compiled once for each decoder, in the place of :func:`decode` here.

What the sizes mean for caches is said beside them; docs/performance-findings.md has what was measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.conversions import narrow_row
from modulora_core.kernels.cpu.product_loops import (
    BLOCK,
    PAIR,
    add_products_of_four,
    add_products_of_one,
    add_rows_of_four,
    add_rows_of_one,
)
from modulora_core.kernels.cpu.scratch import on_stack, scratch
from modulora_core.kernels.cpu.shares import share, signed

STRIP = 16
"""Rows of Ŵ that are decoded before they are multiplied, where X has four rows or more."""

TALL_STRIP = 32
"""The same of a transposed product in fp32; of bf16 it is twice as many. For each strip its sums are loaded and stored once more."""

CHUNK = 2048
"""Columns that are decoded at once: memory likes to be read in long rows. A strip takes 128 KiB of the L2 cache, or 256."""

PANEL = 512
"""Columns that are multiplied at once, by all rows of X: a strip of them takes 32 KiB of the L1 cache. X Ŵᵀ of bf16 has twice as many."""

SUMS = 2**14
"""How many sums of a transposed product are added to at once, where that leaves a panel of columns: 64 KiB, loaded and stored for each
strip of rows."""

GAP = 64
"""Bytes between two decoded rows. Where their length is a power of two, as in most layers, a column of them, which a transposed product
reads, would otherwise share a few lines of the L1 cache, and not stay there."""

SCRATCH = 4096
"""fp32 values that are decoded before they are rounded to bf16: 16 KiB of the L1 cache."""

_PIECE = 16  # rows that a thread takes at once


def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Stands in the templates below for a plugin's own."""
    raise NotImplementedError


def fill(weight: Any, first: int, out: Any) -> None:
    for piece in prange((len(out) + _PIECE - 1) // _PIECE):
        start = signed(piece) * _PIECE
        decode(weight, first + start, 0, out.shape[1], out[start : min(start + _PIECE, len(out))])


_before_rounding = on_stack(SCRATCH, np.float32)


def rounded(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """A decoder like ``decode``, but that ``out`` holds the bits of bf16 numbers."""
    width = max(1, min(CHUNK, columns))
    together = min(len(out), SCRATCH // width)
    w = _before_rounding()[: together * width].reshape(together, width)
    for first in range(0, len(out), together):
        count = min(together, len(out) - first)
        for at in range(0, columns, width):
            size = min(width, columns - at)
            decode(weight, row + first, start + at, size, w[:count])
            for r in range(count):
                narrow_row(w[r, :size], out[first + r, at : at + size])


@jit(fastmath=("reassoc", "contract", "nsz"), borrows=True)
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for k in range(a.size):
        total += a[k] * b[k]
    return total


def few(weight: Any, threads: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one to three rows: two rows of Ŵ at a time live in the L1 cache."""
    n, columns = x.shape
    for index in prange(threads):
        begin, stop = share(index, threads, y.shape[1], 2)
        w = scratch(2, columns, np.float32)
        for o in range(begin, stop, 2):
            two = min(2, stop - o)
            decode(weight, o, 0, columns, w[:two])
            for j in range(two):
                for r in range(n):
                    y[r, o + j] = _dot(w[j], x[r])


@jit(fastmath=("contract",), borrows=True)
def _add_four(total: Any, w: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    for k in range(total.size):
        total[k] += a * w[0, k] + b * w[1, k] + c * w[2, k] + d * w[3, k]


def few_transposed(weight: Any, threads: int, columns: int, y: Any, sums: Any) -> None:
    """``x = y Ŵ`` for one to three rows; each part of ``sums`` has its share of the rows of Ŵ, from one end to the other.

    Four rows at a time: loading and storing the sums costs as much as adding to them.
    """
    parts, n = sums.shape[:2]
    rows = y.shape[1]
    rows_of_part = (rows + parts - 1) // parts
    chunks = (columns + CHUNK - 1) // CHUNK
    for index in prange(threads):
        w = scratch(4, min(CHUNK, columns), np.float32)
        w[:] = 0
        for piece in range(*share(index, threads, parts * chunks)):
            part, start = piece // chunks, piece % chunks * CHUNK
            stop, last = min(start + CHUNK, columns), min((part + 1) * rows_of_part, rows)
            sums[part, :, start:stop] = 0
            for o in range(part * rows_of_part, last, 4):
                four = min(4, last - o)
                decode(weight, o, start, stop - start, w[:four])
                for r in range(n):  # of what is left in w from the last four, nothing is added
                    b = y[r, o + 1] if four > 1 else np.float32(0)
                    c = y[r, o + 2] if four > 2 else np.float32(0)
                    d = y[r, o + 3] if four > 3 else np.float32(0)
                    _add_four(sums[part, r, start:stop], w, y[r, o], b, c, d)


def many(weight: Any, threads: int, columns: int, x: Any, y: Any) -> None:
    """``x`` is padded to whole vectors; Ŵ has ``columns``."""
    n, rows = y.shape
    padded, whole = x.shape[1], n // BLOCK * BLOCK
    chunk, panel = min(CHUNK, padded), PANEL * 4 // x.itemsize
    for index in prange(threads):
        begin, stop = share(index, threads, rows, STRIP)
        w = scratch(STRIP, chunk + GAP // x.itemsize, x.dtype)
        sums = scratch(n, STRIP, np.float32)
        for first in range(begin, stop, STRIP):
            count = min(STRIP, stop - first)
            for r in range(n):  # not slices: they take longer than so few values
                for o in range(STRIP):
                    sums[r, o] = 0
            for start in range(0, columns, chunk):
                size, width = min(chunk, columns - start), min(chunk, padded - start)
                if size < width:
                    w[:, size:width] = 0
                decode(weight, first, start, size, w[:count])
                for at in range(0, width, panel):
                    part = min(panel, width - at)
                    for r in range(0, whole, BLOCK):
                        for o in range(0, count, BLOCK):
                            add_products_of_four(x, r, start + at, w, o, at, part, sums)
                    for r in range(whole, n):
                        for o in range(0, count, PAIR):
                            add_products_of_one(x, r, start + at, w, o, at, part, sums)
            for r in range(n):
                for o in range(count):
                    y[r, first + o] = sums[r, o]


def many_transposed(weight: Any, threads: int, rows: int, columns: int, y: Any, sums: Any) -> None:
    """Each part of ``sums``, ``[parts, n, padded columns]``, has its share of the rows of Ŵ, from one end to the other.

    ``y`` is padded to whole vectors; Ŵ has ``rows``.
    """
    parts, n, padded = sums.shape
    whole = n // BLOCK * BLOCK
    rows_of_part = (rows + parts - 1) // parts
    # bf16 is multiplied in pairs of rows: only the last may be left without another
    rows_of_part += rows_of_part % 2
    strip = TALL_STRIP * 4 // y.itemsize
    chunk = min(CHUNK, max(PANEL, SUMS // n // PANEL * PANEL), padded)
    chunks = (padded + chunk - 1) // chunk
    for index in prange(threads):
        w = scratch(strip, chunk + GAP // y.itemsize, y.dtype)
        for piece in range(*share(index, threads, parts * chunks)):
            part, start = piece // chunks, piece % chunks * chunk
            size, width = min(chunk, columns - start), min(chunk, padded - start)
            sums[part, :, start : start + width] = 0
            w[:, size:width] = 0
            last = min((part + 1) * rows_of_part, rows)
            for first in range(part * rows_of_part, last, strip):
                count = min(strip, last - first)
                decode(weight, first, start, size, w[:count])
                if count % 2:
                    w[count] = 0
                for at in range(0, width, PANEL):
                    of_panel = min(PANEL, width - at)
                    for r in range(0, whole, BLOCK):
                        add_rows_of_four(
                            y, r, first, count, w, at, of_panel, sums, part * n + r, start + at
                        )
                    for r in range(whole, n):
                        add_rows_of_one(
                            y, r, first, count, w, at, of_panel, sums, part * n + r, start + at
                        )
