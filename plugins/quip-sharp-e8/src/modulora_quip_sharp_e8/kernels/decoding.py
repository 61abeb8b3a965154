"""Decodes codes to C on a CPU, sixteen numbers at a time, for numba's kernels.

Two codes are a pair: sixteen numbers. Kernels decode a pair in one of two ways::

    tables     a point is a row of 256 vectors times a row of 256 signs, plus or minus 1/4
    nibbles    a coordinate has few values: a nibble names it, and one register holds the values

Nibbles need AVX-512 with permutations of bytes (VBMI), which find the nibbles of 64 codes at once.

A point of E8P12 has coordinates ±1/2, ±3/2 or ±5/2, plus or minus 1/4. A nibble holds the number
of the magnitude, the sign, and the side. The nibbles of a code are the exclusive or of two rows
of 256 tables: by its high byte and by its low byte. E8₁ has nine values, and one table.

A word of 64 bits holds the nibbles of a pair: even coordinates low, odd coordinates high. Eight
copies, shifted by 0, 4, 8, … 28 bits, have the sixteen nibbles in the low bits of their halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from modulora_kernels.cpu import (
    LANES,
    jit,
    load,
    lookup,
    multiply_add,
    splat,
    store_rounded,
    sum_of_lanes,
)
from torch import Tensor

from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.kernels.operations import (
    CODES,
    PERMUTES_BYTES,
    code,
    finder,
    nibbles,
    rows,
    two,
)

NIBBLES = PERMUTES_BYTES
"""Whether kernels decode by nibbles."""

AT_ONCE = 2
"""Pairs that are rounded by one instruction."""

_NEGATIVE, _BELOW = 4, 8  # bits of a nibble: the sign, and the side of -1/4
_STEP_4 = codebooks.residual_step(4).numpy()[()]


def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """``vectors[code >> 8] * signs[code & 255] + shifts[code & 255]`` is the point."""
    points = codebooks.e8p()
    odd = torch.tensor([code.bit_count() & 1 for code in range(256)], device="cpu")
    shifts = 0.25 - 0.5 * odd
    # code 0 has no signs, and vector 0 is (1/2)⁸
    return points[::256] - 0.25, (points[:256] - shifts[:, None]).sign(), shifts


_V, _S, _T = _tables()
_VECTORS, _SIGNS, _SHIFTS = (table.flatten().numpy() for table in (_V, _S, _T))
_POINTS_3 = (codebooks.e81() * codebooks.residual_step(3)).flatten().numpy()


# --- by tables -------------------------------------------------------------------------------


@jit(borrows=True)
def _points(a, b):
    """The points of two codes of E8P12."""
    like = splat(np.float32(0))
    vectors = rows(_VECTORS, BLOCK * (a >> 8), BLOCK * (b >> 8), like)
    signs = rows(_SIGNS, BLOCK * (a & 255), BLOCK * (b & 255), like)
    return multiply_add(vectors, signs, two(_SHIFTS, a & 255, b & 255, like))


@jit(borrows=True)
def _by_tables(codes, residual, first, end, pair):
    """Pairs of the codes from number ``first`` on. The last code, ``end``, may have no partner."""
    i = first + 2 * pair
    j = min(i + 1, end)
    values = _points(code(codes, i), code(codes, j))
    if residual is None:
        return values
    a, b = code(residual, i), code(residual, j)
    if residual.itemsize == 1:
        return values + rows(_POINTS_3, BLOCK * a, BLOCK * b, values)
    return values + _points(a, b) * _STEP_4


# --- by nibbles ------------------------------------------------------------------------------


def _magnitudes() -> Tensor:
    sizes: Tensor = _V.abs().unique()
    return sizes


def _nibble_tables() -> tuple[Tensor, Tensor, Tensor]:
    """Nibbles by the high byte of a code, by its low byte, and by a code of E8₁: ``[256, 8]``."""
    high: Tensor = torch.searchsorted(_magnitudes(), _V.abs()) | (_V < 0) * _NEGATIVE
    low = (_S < 0) * _NEGATIVE | (_T < 0)[:, None] * _BELOW
    leaves: Tensor = torch.searchsorted(codebooks.e81().unique(), codebooks.e81())
    return high, low, leaves


_find_words = finder(*_nibble_tables())


def _levels(bits: int) -> Any:
    """The number of each nibble: of E8P12 for 2 bits, else of a residual, times its step."""
    if bits == 3:
        numbers = codebooks.e81().unique()
    else:
        nibble, magnitudes = torch.arange(LANES, device="cpu"), _magnitudes()
        sizes = magnitudes[(nibble & 3).clamp(max=len(magnitudes) - 1)]
        numbers = torch.where(nibble & _NEGATIVE > 0, -sizes, sizes)
        numbers = numbers + torch.where(nibble & _BELOW > 0, -0.25, 0.25)
    if bits > 2:
        numbers = numbers * codebooks.residual_step(bits)
    return torch.cat([numbers, torch.zeros(LANES - len(numbers), device="cpu")]).numpy()


_LEVELS, _LEVELS_3, _LEVELS_4 = map(_levels, (2, 3, 4))


@jit(borrows=True)
def _by_nibbles(words, residual, first, _end, pair):
    """Pairs of the words from number ``first`` on: ``[2, n]``, the residual's last."""
    at, like = first + pair, splat(np.int32(0))
    values = lookup(load(_LEVELS, 0), nibbles(words, at, like))
    if residual is None:
        return values
    levels = _LEVELS_3 if residual.itemsize == 1 else _LEVELS_4
    return values + lookup(load(levels, 0), nibbles(words, at + words.shape[1], like))


@jit(borrows=True)
def find_nibbles(codes, residual, at, count, words):
    """Write the words of ``count`` codes from number ``at`` on, and of their residual, if any.

    ``words`` is int64 ``[2, n]`` with room for whole groups of 64 codes: ``n`` from
    :func:`room_for`.
    """
    for start in range(0, count, CODES):
        size = min(CODES, count - start)
        _find_words(codes, at + start, size, words, start // 2)
        _find_words(residual, at + start, size, words, words.shape[1] + start // 2)


@jit()
def room_for(count):
    """The words of ``count`` codes, in whole groups of 64."""
    return (count + CODES - 1) // CODES * (CODES // 2)


# --- either way ------------------------------------------------------------------------------

_values = _by_nibbles if NIBBLES else _by_tables


@jit(borrows=True)
def expand(source, residual, first, end, pairs, out, at):
    """Write ``pairs`` pairs of C, an even number, to ``out[at:]``, as if it were flat.

    ``out`` is fp32, or has the bits of bf16. ``source`` is codes, or words when :data:`NIBBLES`.
    ``residual`` is None at 2 bits. Words only read its type, uint8 at 3 bits and int16 at 4.
    """
    most = (end - first) // (1 if NIBBLES else 2)  # the second of the last two may not be there
    for pair in range(0, pairs, AT_ONCE):
        a = _values(source, residual, first, end, pair)
        b = _values(source, residual, first, end, min(pair + 1, most))
        store_rounded(out, at + LANES * pair, a, b)


@jit(borrows=True)
def dot(source, residual, first, end, pairs, x):
    """The sum of ``pairs`` pairs of C times fp32 ``x[: 16 · pairs]``; see :func:`expand`."""
    a = b = c = d = splat(np.float32(0))  # an addition waits for the one before
    whole = pairs // 4 * 4
    for p in range(0, whole, 4):
        k = LANES * p
        a = multiply_add(_values(source, residual, first, end, p), load(x, k), a)
        b = multiply_add(_values(source, residual, first, end, p + 1), load(x, k + LANES), b)
        c = multiply_add(_values(source, residual, first, end, p + 2), load(x, k + 2 * LANES), c)
        d = multiply_add(_values(source, residual, first, end, p + 3), load(x, k + 3 * LANES), d)
    for p in range(whole, pairs):
        a = multiply_add(_values(source, residual, first, end, p), load(x, LANES * p), a)
    return sum_of_lanes(((a + b) + c) + d)
