"""Half-quadratic weights on the CPU, compiled by numba: the values of the reference, decoded a row at a time.

In all kernels ``packed`` is uint8 ``[out, row_bytes]``, as :mod:`modulora_half_quadratic.packing` arranges it; ``scales`` and
``offsets`` are fp32 ``[out, groups]``, times the unit; ``group`` columns share one of each. Packing has no kernel: torch
vectorizes all that it does, the powers too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.products import RowKernels


@jit(borrows=True)
def _take_line(plane: Any, shift: int, mask: int, low: int, codes: Any) -> None:
    """Add a line of a plane to the codes, from their bit ``low`` on."""
    for k in range(codes.size):
        codes[k] |= ((plane[k] >> shift) & mask) << low


@jit(borrows=True)
def _unpack(packed: Any, bits: int, codes: Any) -> None:
    """All codes of the row ``packed``."""
    n = codes.size
    codes[:] = 0
    begin, low = 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            line = (n * width + 7) // 8
            plane = packed[begin : begin + line]
            mask = np.uint8((1 << width) - 1)
            for i in range(8 // width):
                part = codes[min(n, i * line) : min(n, (i + 1) * line)]
                _take_line(plane, np.uint8(i * width), mask, np.uint8(low), part)
            begin += line
            low += width


@jit(borrows=True)
def _scale(codes: Any, scale: Any, offset: Any, out: Any) -> None:
    for k in range(out.size):
        out[k] = np.float32(codes[k]) * scale + offset


@jit(borrows=True)
def _decode(
    packed: Any, scales: Any, offsets: Any, bits: int, group: int, codes: Any, out: Any
) -> None:
    """A row of Ŵ from its bytes, scales and offsets; ``codes`` is scratch of the same length, uint8."""
    _unpack(packed, bits, codes)
    for g in range(scales.size):
        a, b = g * group, min((g + 1) * group, out.size)
        _scale(codes[a:b], scales[g], offsets[g], out[a:b])


@jit()
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...`` of the rows from ``row`` on: see :class:`modulora_core.kernels.cpu.products.RowKernels`.

    Bits are unpacked by the whole row, so what is asked for in parts (rows of more than 2048 columns) goes through a scratch. Rows may be
    of any length, so it is no scratch on the stack (:func:`modulora_core.kernels.cpu.scratch.on_stack`), and the function doesn't borrow.
    """
    packed, scales, offsets, bits, group, n = weight
    codes = np.empty(n, np.uint8)
    whole = np.empty(0 if columns == n else n, np.float32)
    for r in range(len(out)):
        o = row + r
        if columns == n:
            _decode(packed[o], scales[o], offsets[o], bits, group, codes, out[r, :n])
        else:
            _decode(packed[o], scales[o], offsets[o], bits, group, codes, whole)
            out[r, :columns] = whole[start : start + columns]


rows = RowKernels(decode)
"""Tiles and few-row products."""
