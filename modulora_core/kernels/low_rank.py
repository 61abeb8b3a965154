"""Activations times the factors of a LoRA adapter on the CPU: one pass over activations in fp32 or bf16, and no copy of them.

    U  = X Aᵀ          RowKernels, with X in the place of Ŵ: Uᵀ = A Xᵀ
    dA = Vᵀ X          likewise, transposed
    Y += U W           for each 16 rows, for each panel of columns, for each four rows: sums += U[four] · W[:, panel];  Y += sums

X is ``[n, in]``, U and V are ``[n, r]``. Each moves X once, or Y twice, in its own dtype, and does 2 n · in · r operations in fp32: for
small r the floor is the bandwidth of a cache. Products of torch need a copy of X in fp32 first where it is bf16, or where a part of it
is left out.

Activations of bf16 come as the int16 of their bits. ``keep``, bool like X or ``[0, 0]``, says what counts of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.conversions import narrow_row, widen, widen_row
from modulora_core.kernels.product_loops import BLOCK, add_rows_of_four, add_rows_of_one
from modulora_core.kernels.product_templates import PANEL
from modulora_core.kernels.products import RowKernels
from modulora_core.kernels.vectors import LANES as LANES

_PIECE = 16  # rows that a thread takes at once


@jit(borrows=True)
def _clear(keep: Any, x: Any) -> None:
    for k in range(x.size):
        x[k] = x[k] if keep[k] else np.float32(0)


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...`` of the rows from ``row`` on, of what counts: ``weight`` is X and ``keep``."""
    x, keep = weight
    for r in range(len(out)):
        widen_row(x[row + r, start : start + columns], out[r, :columns])
        if keep.size:
            _clear(keep[row + r, start : start + columns], out[r, :columns])


rows = RowKernels(decode)
"""X as a matrix that few rows are multiplied by: those of A, or of Vᵀ."""


@jit(borrows=True)
def _add(sums: Any, y: Any) -> None:
    """``y += sums``; ``sums`` is scratch."""
    for k in range(y.size):
        sums[k] += widen(y[k])
    narrow_row(sums[: y.size], y)


@jit(parallel=True)
def add_expanded(u: Any, w: Any, keep: Any, y: Any) -> None:
    """``y += u w`` where it counts: ``u`` ``[n, r]`` and ``w`` ``[r, columns]``, its columns padded to whole vectors, are fp32."""
    n, columns = y.shape
    rank, padded = w.shape
    for piece in prange((n + _PIECE - 1) // _PIECE):
        sums = np.empty((BLOCK, PANEL), np.float32)
        begin: Any = np.int64(piece) * _PIECE
        stop = min(begin + _PIECE, n)
        for start in range(0, padded, PANEL):
            part = min(PANEL, padded - start)
            last = min(start + part, columns)
            for r in range(begin, stop, BLOCK):
                count = min(BLOCK, stop - r)
                sums[:] = 0
                if count == BLOCK:
                    add_rows_of_four(u, r, 0, rank, w, start, part, sums, 0, 0)
                else:
                    for i in range(count):
                        add_rows_of_one(u, r + i, 0, rank, w, start, part, sums, i, 0)
                for i in range(count):
                    if keep.size:
                        _clear(keep[r + i, start:last], sums[i, : last - start])
                    _add(sums[i], y[r + i, start:last])
