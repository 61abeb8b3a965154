"""Products of many rows by AMX, which are compiled once for each decoder, in the place of :func:`decode` here.

    squares              Y = X Ŵᵀ      Xᵀ is sliced; for each piece of Ŵ's rows, for each part of its columns:
                                       decode, slice;  sums += Ŵ[piece, part] · Xᵀ[part];  at last  Y[:, piece] = sumsᵀ
    squares_transposed   X = Y Ŵ       Y is sliced; for each piece of Ŵ's columns, for each part of its rows:
                                       decode, slice;  sums += Y[:, part] · Ŵ[part, piece];  at last  X[:, piece] = sums

They go the way of :mod:`modulora_core.kernels.cpu.block_templates`, on bf16 slices of both factors (:mod:`modulora_core.kernels.cpu.amx`). For n
rows and a weight of ``out · in`` values of b bits, ``out · in · b / 8`` bytes are read from memory once, and the slices of X or Y, 6 bytes
of a number where there are three, once for each piece. Their products are ``6 · 2 n · out · in`` operations in bf16, which is the floor,
beside those of decoding and slicing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.amx import (
    LINES,
    SIDE,
    STEP,
    add_square,
    leave_registers,
    put_pair,
    put_row,
    use_registers,
)
from modulora_core.kernels.cpu.block_loops import put_transposed
from modulora_core.kernels.cpu.block_templates import (
    BETWEEN,
    CHUNK,
    most_units,
    pieces_of,
    put_rows,
    put_sums,
)
from modulora_core.kernels.cpu.product_templates import decode
from modulora_core.kernels.cpu.scratch import scratch
from modulora_core.kernels.cpu.shares import share, signed

PART = 128
"""Terms that are added to a sum at once: of 32 rows or columns, 24 KiB in three slices, which stay in the L1 cache while those that they
are multiplied by go by."""

MOST = 320
"""Rows or columns of Ŵ of which a thread has a part decoded at once, at most: their sums with 512 rows of X are 640 KiB."""

RUN = 256
"""Columns of a row of Ŵ that are decoded at once: more than a part, since rows are decoded faster in longer pieces. In three slices they
are 480 KiB of :data:`MOST` rows.
"""

FEW_PANELS = 4
"""Blocks of rows of X whose sums leave room in the cache for pieces of twice the length."""

_HALF = SIDE // 2  # lines of a register


@jit()
def _steps(terms: int) -> int:
    return (terms + STEP - 1) // STEP


@jit()
def _twice_if_few(count: int, panels: int) -> int:
    """``count``, where sums with so many panels of X leave room for no more."""
    return count if panels > FEW_PANELS else 2 * count


@jit()
def _pieces(side: int, most: int, block_bytes: int, budget: int, threads: int) -> Any:
    """Into how many pieces to cut so many rows or columns of Ŵ: each has ``most`` at most, and is decoded within the budget."""
    return pieces_of(
        (side + SIDE - 1) // SIDE, most_units(most // SIDE, budget, block_bytes // 4), threads
    )


@jit(borrows=True)
def _put_steps(
    slices: int,
    x: Any,
    row: int,
    start: int,
    size: int,
    out: Any,
    line: int,
    leap: int,
    apart: int,
    room: Any,
) -> None:
    """Lines of A of ``x[row, start : start + size]``, ``leap`` from step to step; zeros for what is beyond, and for a row that isn't there.

    ``room``: ``[1, STEP]`` of X's dtype, to write to.
    """
    whole = size // STEP if row < len(x) else 0
    for step in range(whole):
        put_row(slices, x, row, start + step * STEP, out, line + step * leap, apart)
    for step in range(whole, _steps(size)):
        room[:] = 0
        if row < len(x):
            rest = size - step * STEP
            for k in range(rest):
                room[0, k] = x[row, start + step * STEP + k]
        put_row(slices, room, 0, 0, out, line + step * leap, apart)


@jit()
def _put_panel(slices: int, x: Any, first: int, start: int, size: int, out: Any, line: int) -> None:
    """Lines of B, whose columns are :data:`SIDE` rows of X and whose terms are ``size`` columns from ``start`` on."""
    room = scratch(1, STEP, x.dtype)
    pairs = scratch(
        PART // STEP * slices * _HALF, STEP // 2, np.float32
    )  # two numbers of bf16 each
    of_rows, of_columns = pairs.view(np.int16), out.view(np.float32)
    for part in range(0, size, PART):
        wide = min(PART, size - part)
        for half in range(2):
            for r in range(_HALF):
                row = first + half * _HALF + r
                _put_steps(
                    slices, x, row, start + part, wide, of_rows, r, slices * _HALF, _HALF, room
                )
            for index in range(_steps(wide) * slices):
                to = line + part // STEP * slices * LINES + index * LINES + half * _HALF
                put_transposed(pairs, index * _HALF, 0, of_columns, to, 0)


def squares(weight: Any, threads: int, budget: int, slices: int, x: Any, y: Any) -> None:
    """``x``, fp32 or bf16 ``[n, in]``, and ``y``, fp32 ``[n, out]``, are C-contiguous.

    ``budget``: bytes of Ŵ that a thread may have decoded at once; ``slices``: 1, 2 or 3, of bf16 1.
    """
    n, columns = x.shape
    panels = (n + SIDE - 1) // SIDE
    lines, wide = slices * LINES, _twice_if_few(RUN, panels)
    pieces = _pieces(y.shape[1], MOST, SIDE * wide * slices * 2, budget, threads)
    for start in range(0, columns, CHUNK):
        size = min(CHUNK, columns - start)
        along = _steps(size) * lines
        sliced = scratch(panels * along, STEP, np.int16)
        for index in prange(panels):
            panel = signed(index)
            _put_panel(slices, x, panel * SIDE, start, size, sliced, panel * along)
        for index in prange(pieces):
            begin, stop = share(index, pieces, y.shape[1], SIDE)
            rows = stop - begin
            blocks = (rows + SIDE - 1) // SIDE
            w = scratch(SIDE, wide + BETWEEN, np.float32)
            a = scratch(blocks * (wide // STEP) * lines, STEP, np.int16)
            sums = scratch(blocks * SIDE, panels * SIDE + BETWEEN, np.float32)
            sums[:] = 0
            use_registers()
            for run in range(0, size, wide):
                long = min(wide, size - run)
                of_run = _steps(long) * lines
                for block in range(blocks):
                    high = min(SIDE, rows - block * SIDE)
                    decode(weight, begin + block * SIDE, start + run, long, w[:high])
                    w[high:] = 0
                    w[:, long : _steps(long) * STEP] = 0
                    for r in range(SIDE):
                        for step in range(_steps(long)):
                            put_row(
                                slices,
                                w,
                                r,
                                step * STEP,
                                a,
                                block * of_run + step * lines + r,
                                LINES,
                            )
                for part in range(0, long, PART):
                    steps, at = _steps(min(PART, long - part)), part // STEP * lines
                    here = run // STEP * lines + at
                    # of the panel that comes then, for each block and step
                    ahead = (lines + blocks - 1) // blocks
                    for panel in range(panels):
                        then = (
                            (panel + 1) * along + here
                            if panel + 1 < panels
                            else here + steps * lines
                        )
                        for block in range(blocks):
                            add_square(slices, a, block * of_run + at, sliced, panel * along + here, steps,
                                       sums, block * SIDE, panel * SIDE, sliced, then + block * steps * ahead, ahead)  # fmt: skip
            leave_registers()
            put_sums(sums, rows, y, begin, start > 0)


def squares_transposed(weight: Any, threads: int, budget: int, slices: int, y: Any, x: Any) -> None:
    """``y``, fp32 or bf16 ``[n, out]``, and ``x``, fp32 ``[n, in]``, are C-contiguous; ``budget`` and ``slices`` as above."""
    n, rows = y.shape
    panels = (n + SIDE - 1) // SIDE
    lines = slices * LINES
    pieces = _pieces(
        x.shape[1], _twice_if_few(MOST, panels), SIDE * PART * (4 + slices * 2), budget, threads
    )
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        along = _steps(size) * lines
        sliced = scratch(panels * along, STEP, np.int16)
        for index in prange(panels):
            panel = signed(index)
            room = scratch(1, STEP, y.dtype)
            for r in range(SIDE):
                _put_steps(
                    slices,
                    y,
                    panel * SIDE + r,
                    start,
                    size,
                    sliced,
                    panel * along + r,
                    lines,
                    LINES,
                    room,
                )
        for index in prange(pieces):
            begin, stop = share(index, pieces, x.shape[1], SIDE)
            columns = stop - begin
            blocks = (columns + SIDE - 1) // SIDE
            w = scratch(PART, blocks * SIDE + BETWEEN, np.float32)
            b = scratch(blocks * (PART // STEP) * lines, STEP, np.int16)
            sums = scratch(panels * SIDE, blocks * SIDE + BETWEEN, np.float32)
            sums[:] = 0
            use_registers()
            for part in range(0, size, PART):
                deep = min(PART, size - part)
                steps, here = _steps(deep), part // STEP * lines
                decode(weight, start + part, begin, columns, w[:deep])
                w[deep : steps * STEP] = 0
                w[:deep, columns:] = 0
                for block in range(blocks):
                    for pair in range(steps * STEP // 2):
                        step, of_step = pair // _HALF, pair % _HALF
                        for half in range(2):
                            line = (block * steps + step) * lines + half * _HALF + of_step
                            put_pair(
                                slices, w, 2 * pair, block * SIDE + half * _HALF, b, line, LINES
                            )
                ahead = (lines + blocks - 1) // blocks
                for panel in range(panels):
                    then = (
                        (panel + 1) * along + here if panel + 1 < panels else here + steps * lines
                    )
                    for block in range(blocks):
                        add_square(slices, sliced, panel * along + here, b, block * steps * lines, steps,
                                   sums, panel * SIDE, block * SIDE, sliced, then + block * steps * ahead, ahead)  # fmt: skip
            leave_registers()
            put_rows(sums, x, begin, columns, start > 0)
