"""Tiles and few-row products on the CPU, once for every quantizer: a plugin writes how rows are decoded, and no loop.

    @jit()
    def decode(weight, row, start, columns, out): ...     # columns start, start + 1, ... of rows row, row + 1, ...

    kernels = RowKernels(decode)

    tile        Ŵ[a:b]       for each 16 rows: decode; for bf16, into a scratch in the L1 cache, and round from there
    products    Y = X Ŵᵀ     for each strip of rows of Ŵ, for each chunk of columns: decode;  Y[:, strip] += X[:, chunk] · stripᵀ
                X = Y Ŵ      for each share of the rows of Ŵ, for each chunk of columns, for each strip: decode;
                             sums[share, :, chunk] += Y[:, strip] · strip

What a product moves and multiplies, for n rows and a weight of ``out · in`` values of b bits: ``out · in · b / 8`` bytes are
read from memory, once; decoded strips live in the L1 and L2 caches. ``2 n · out · in`` operations are done in fp32, beside those
of decoding. The floor is the larger of bytes / bandwidth and operations / peak. For one row decoding is the bound, from about
16 rows on the multiplications are.

The inner loops are those of :mod:`modulora_core.kernels.vectors`. Every sum is made in one order, whatever the number of threads.

This module imports numba: plugins import it from their own modules of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn import functional as F

from modulora_core.kernels import PARTIAL_SUMS, filled_tile, jit, launch, room_for, rows_of
from modulora_core.kernels.conversions import narrow_row
from modulora_core.kernels.vectors import (
    BLOCK,
    LANES,
    PAIR,
    add_products_of_four,
    add_products_of_one,
    add_rows_of_four,
    add_rows_of_one,
)

STRIP = 16
"""Rows of Ŵ that are decoded before they are multiplied, where X has four rows or more."""

CHUNK = 2048
"""Columns that are decoded at once: memory likes to be read in long rows. A strip takes 128 KiB of the L2 cache."""

PANEL = 512
"""Columns that are multiplied at once, by all rows of X: a strip of them takes 32 KiB of the L1 cache."""

PARTED_ROWS = 32
"""Rows of X up to which a transposed product has :data:`PARTIAL_SUMS` sums; of more rows they would be more memory than a tile, so there
are half as many, of half as many columns at a time."""

_PIECE = 16  # rows that a thread takes at once

Weight = tuple[Any, ...]
"""What a decoder reads: whole numbers, and contiguous tensors on the CPU, or arrays (:func:`modulora_core.kernels.operands`)."""


class RowKernels:
    """The kernels of a quantizer whose rows are decoded one by one.

    Args:
        decode: compiled by :func:`modulora_core.kernels.jit`. ``decode(weight, row, start, columns, out)`` writes columns ``[start, start +
            columns)`` of the rows from ``row`` on, as many as ``out`` has, to the first columns of ``out``: fp32
            ``[rows, columns or more]``, C-contiguous. ``weight`` is what the methods are given, a tuple of arrays and numbers.

        one_row: where decoding in registers is worth a kernel of its own for a single row, it. ``one_row(weight, x, y)`` writes ``y =
            x Ŵᵀ``, fp32 ``[1, in]`` and ``[1, out]``.
        takes: which weights ``one_row`` can multiply by: ``takes(weight)``; by default all.

    The kernels are compiled at their first call for a type of weight, with ``decode`` inside of them, and kept on disk beside
    the module of ``decode``.
    """

    def __init__(
        self,
        decode: Any,
        one_row: Callable[..., None] | None = None,
        takes: Callable[[Weight], bool] = lambda _: True,
    ) -> None:
        self._one_row, self._takes = one_row, takes
        self._fill, self._fill_rounded = _compiled(_fill, decode), _compiled(_fill_rounded, decode)
        self._few, self._few_transposed = _compiled(_few, decode), _compiled(_few_transposed, decode)
        self._many, self._many_transposed = _compiled(_many, decode), _compiled(_many_transposed, decode)

    def dequantize(self, weight: Weight, first: int, out: Tensor) -> None:
        """Rows ``first ...`` of Ŵ to all of ``out``, fp32 or bf16 ``[rows, in]``, contiguous."""
        if out.dtype == torch.bfloat16:
            launch(self._fill_rounded, weight, first, out.view(torch.int16))
        else:
            launch(self._fill, weight, first, out)

    def tile(self, weight: Weight, rows: tuple[int, int], features: int, dtype: torch.dtype) -> Tensor:
        """Rows ``[start, stop)`` of Ŵ, which has ``features`` columns, in any float dtype: ``[stop - start, features]``."""

        def fill(start: int, _stop: int, out: Tensor) -> None:
            self.dequantize(weight, start, out)

        return filled_tile(fill, rows, features, dtype, (torch.float32, torch.bfloat16))

    def matmul(self, weight: Weight, x: Tensor, features: int, transpose: bool = False) -> Tensor:
        """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, for few rows.

        Args:
            weight: what the decoder is given.
            x: fp32 ``[..., in]``, or ``[..., out]`` when ``transpose``, contiguous (:func:`modulora_core.kernels.few_rows`).
            features: of the result: ``out``, or ``in`` when ``transpose``.

        Returns:
            fp32 ``[..., features]``, contiguous.
        """
        rows = rows_of(x)
        n, given = rows.shape
        few = n < BLOCK
        if transpose:
            parts = PARTIAL_SUMS if n <= PARTED_ROWS else PARTIAL_SUMS // 2
            sums = torch.empty(parts, n, features + -features % LANES)
            launch(self._few_transposed if few else self._many_transposed, weight, features, rows, sums)
            return sums.sum(dim=0)[:, :features].reshape(*x.shape[:-1], features).contiguous()
        y = room_for(x, features)
        if n == 1 and self._one_row is not None and self._takes(weight):
            launch(self._one_row, weight, rows, rows_of(y))
        elif few:
            launch(self._few, weight, rows, rows_of(y))
        else:
            padded = rows_of(F.pad(x, (0, -given % LANES))) if given % LANES else rows
            launch(self._many, weight, given, padded, rows_of(y))
        return torch.from_numpy(y)


def _compiled(template: Callable[..., None], decode: Any) -> Any:
    """``template`` with ``decode`` in it, as if it stood in the module of ``decode``.

    numba keeps compiled code by the file of a function and its name: the file is the plugin's, and the name says which decoder it is. A
    function handed over as an argument would be called through a pointer, which takes more time at one row.
    """
    owner = decode.py_func
    code = template.__code__.replace(co_filename=owner.__code__.co_filename)
    function = FunctionType(code, {**template.__globals__, "decode": decode}, template.__name__)
    function.__module__ = owner.__module__
    function.__qualname__ = f"{owner.__qualname__}{template.__name__}"
    return jit(parallel=True)(function)


def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Stands in the templates below for a plugin's own."""
    raise NotImplementedError


@jit()
def _signed(index: Any) -> Any:
    """That of a ``prange`` is unsigned, and numba takes the sum of an unsigned and a signed number for a float."""
    return np.int64(index)


def _fill(weight: Any, first: int, out: Any) -> None:
    for piece in prange((len(out) + _PIECE - 1) // _PIECE):
        start = _signed(piece) * _PIECE
        decode(weight, first + start, 0, out.shape[1], out[start : min(start + _PIECE, len(out))])


def _fill_rounded(weight: Any, first: int, out: Any) -> None:
    """``out`` holds the bits of bf16 numbers."""
    columns = out.shape[1]
    for piece in prange((len(out) + _PIECE - 1) // _PIECE):
        w = np.empty((1, min(CHUNK, columns)), np.float32)
        begin = _signed(piece) * _PIECE
        for row in range(begin, min(begin + _PIECE, len(out))):
            for start in range(0, columns, CHUNK):
                size = min(CHUNK, columns - start)
                decode(weight, first + row, start, size, w)
                narrow_row(w[0, :size], out[row, start : start + size])


@jit(fastmath=("reassoc", "contract", "nsz"))
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for k in range(a.size):
        total += a[k] * b[k]
    return total


def _few(weight: Any, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one to three rows: two rows of Ŵ at a time live in the L1 cache."""
    n, columns = x.shape
    rows = y.shape[1]
    for piece in prange((rows + _PIECE - 1) // _PIECE):
        w = np.empty((2, columns), np.float32)
        first = _signed(piece) * _PIECE
        last = min(first + _PIECE, rows)
        for o in range(first, last, 2):
            two = min(2, last - o)
            decode(weight, o, 0, columns, w[:two])
            for j in range(two):
                for r in range(n):
                    y[r, o + j] = _dot(w[j], x[r])


@jit(fastmath=("contract",))
def _add_four(total: Any, w: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    for k in range(total.size):
        total[k] += a * w[0, k] + b * w[1, k] + c * w[2, k] + d * w[3, k]


def _few_transposed(weight: Any, columns: int, y: Any, sums: Any) -> None:
    """``x = y Ŵ`` for one to three rows; each part of ``sums`` has its share of the rows of Ŵ, from one end to the other.

    Four rows at a time: loading and storing the sums costs as much as adding to them.
    """
    parts, n = sums.shape[:2]
    rows = y.shape[1]
    share = (rows + parts - 1) // parts
    chunks = (columns + CHUNK - 1) // CHUNK
    for piece in prange(parts * chunks):
        part, start = _signed(piece) // chunks, _signed(piece) % chunks * CHUNK
        stop, last = min(start + CHUNK, columns), min((part + 1) * share, rows)
        sums[part, :, start:stop] = 0
        w = np.zeros((4, stop - start), np.float32)
        for o in range(part * share, last, 4):
            four = min(4, last - o)
            decode(weight, o, start, stop - start, w[:four])
            for r in range(n):  # of what is left in w from the last four, nothing is added
                b = y[r, o + 1] if four > 1 else np.float32(0)
                c = y[r, o + 2] if four > 2 else np.float32(0)
                d = y[r, o + 3] if four > 3 else np.float32(0)
                _add_four(sums[part, r, start:stop], w, y[r, o], b, c, d)


def _many(weight: Any, columns: int, x: Any, y: Any) -> None:
    """``x`` is padded to whole vectors; Ŵ has ``columns``."""
    n, rows = y.shape
    padded, whole = x.shape[1], n // BLOCK * BLOCK
    chunk = min(CHUNK, padded)
    for piece in prange((rows + _PIECE - 1) // _PIECE):
        w = np.empty((STRIP, chunk), np.float32)
        sums = np.empty((n, STRIP), np.float32)
        begin = _signed(piece) * _PIECE
        stop = min(begin + _PIECE, rows)
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
                for at in range(0, width, PANEL):
                    part = min(PANEL, width - at)
                    for r in range(0, whole, BLOCK):
                        for o in range(0, count, BLOCK):
                            add_products_of_four(x, r, start + at, w, o, at, part, sums)
                    for r in range(whole, n):
                        for o in range(0, count, PAIR):
                            add_products_of_one(x, r, start + at, w, o, at, part, sums)
            for r in range(n):
                for o in range(count):
                    y[r, first + o] = sums[r, o]


def _many_transposed(weight: Any, columns: int, y: Any, sums: Any) -> None:
    """Each part of ``sums``, ``[parts, n, padded columns]``, has its share of the rows of Ŵ, from one end to the other."""
    parts, n, padded = sums.shape
    rows, whole = y.shape[1], n // BLOCK * BLOCK
    share = (rows + parts - 1) // parts
    chunk = min(CHUNK if n <= PARTED_ROWS else CHUNK // 2, padded)
    chunks = (padded + chunk - 1) // chunk
    for piece in prange(parts * chunks):
        share_of, start = _signed(piece) // chunks, _signed(piece) % chunks * chunk
        size, width = min(chunk, columns - start), min(chunk, padded - start)
        sums[share_of, :, start : start + width] = 0
        w = np.empty((STRIP, width), np.float32)
        w[:, size:] = 0
        last = min((share_of + 1) * share, rows)
        for first in range(share_of * share, last, STRIP):
            count = min(STRIP, last - first)
            decode(weight, first, start, size, w[:count])
            for at in range(0, width, PANEL):
                part = min(PANEL, width - at)
                for r in range(0, whole, BLOCK):
                    add_rows_of_four(y, r, first, count, w, at, part, sums, share_of * n + r, start + at)
                for r in range(whole, n):
                    add_rows_of_one(y, r, first, count, w, at, part, sums, share_of * n + r, start + at)
