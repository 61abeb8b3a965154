"""The product of one row with QuIP#'s packed codes on the CPU, where decoding is what it costs: what decoding a token asks for.

    y = x Ŵᵀ, rotations and all

Arrays are as in :mod:`modulora_quip_sharp_e8.cpu`. What is decoded is multiplied in registers and never stored. A weight of out · in
values takes out · in · bits / 8 bytes, read once. At 2 bits sixteen weights cost four operations, and their share of making words
(:mod:`modulora_quip_sharp_e8.cpu_words`); where bytes can't be permuted a block of eight costs two loads from tables, two operations and
about six to find its place in them (:mod:`modulora_quip_sharp_e8.cpu_points`); twice that above 2 bits. The rotations take
K / 4 + log₂ m additions a coordinate and four entries of tables (:mod:`modulora_quip_sharp_e8.cpu_across`), on one thread: to share them
out would take longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import read_ahead, scratch, share
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.cpu_points import dot_points
from modulora_quip_sharp_e8.cpu_transform import turn_rows
from modulora_quip_sharp_e8.cpu_words import (
    dot,
    half_of,
    has_byte_permutations,
    rows_together,
    spell_all,
)

_ROWS = 16  # whose words are made at once, at most
_STEPS = np.array(
    [codebooks.residual_step(bits) if bits > 2 else 0 for bits in range(5)], np.float32
)


@jit()
def _sums_of_blocks(x: Any, blocks: int) -> Any:
    """``Σ x[0, 8 j : 8 j + 8]`` of each block j, fp32 ``[blocks]``."""
    sums = np.empty(blocks, np.float32)
    for j in range(blocks):
        a, b, c, d, e, f, g, h = x[0, 8 * j : 8 * j + 8]
        sums[j] = ((a + b) + (c + d)) + ((e + f) + (g + h))
    return sums


@jit(borrows=True)
def _four_by_points(
    codes: Any, residual: Any, bits: int, first: int, last: int, x: Any, sums: Any, y: Any
) -> None:
    """``y[0, first : first + 4] = C xᵀ``; of the four rows of C those from ``last`` on aren't written."""
    blocks, end = codes.shape[1], last - 1
    second, third, fourth = min(first + 1, end), min(first + 2, end), min(first + 3, end)
    rows = first * blocks, second * blocks, third * blocks, fourth * blocks
    read_ahead(codes, first * blocks, 4 * blocks)
    found = dot_points(codes, rows, blocks, x, sums)
    if bits > 2:
        read_ahead(residual, first * blocks, 4 * blocks)
        left = dot_points(residual, rows, blocks, x, sums)
        for r in range(min(4, last - first)):
            y[0, first + r] = found[r] + _STEPS[bits] * left[r]
    else:
        for r in range(min(4, last - first)):
            y[0, first + r] = found[r]


@jit(borrows=True)
def _one_by_words(
    codes: Any, residual: Any, bits: int, first: int, last: int, x: Any, words: Any, y: Any
) -> None:
    """``y[0, first : last] = C xᵀ``; ``x`` is 0 behind the last block."""
    blocks, count = codes.shape[1], last - first
    spell_all(codes, residual, bits, first * blocks, count * blocks, words)
    half, pairs = half_of(count * blocks), (blocks + 1) // 2
    for r in range(count):
        if bits == 2:
            y[0, first + r] = dot(words, None, r * blocks // 2, half, pairs, x)
        else:
            y[0, first + r] = dot(words, residual, r * blocks // 2, half, pairs, x)


@jit(parallel=True)
def forward_one(weight: Any, threads: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, rotations and all: ``x`` is fp32 ``[1, in]``, ``y`` fp32 ``[1, rows of C]``.

    ``weight`` is codes, residual, bits; the bits of the input's and of the output's scale, int16; the unit, fp32 ``[1]``; then for the
    input's rotation and for the output's the matrix, as :func:`modulora_quip_sharp_e8.transform.laid_out` gives it, and its order.
    """
    codes, residual, bits, input_scale, output_scale, unit, matrix_in, K_in, matrix_out, K_out = (
        weight
    )
    rows, blocks = codes.shape
    turned, z = (
        scratch(1, 16 * ((blocks + 1) // 2), np.float32),
        scratch(1, rows, np.float32),
    )  # whole words
    turned[:] = 0
    there = turned.reshape(turned.size)[: x.shape[1]].reshape(1, x.shape[1])
    turn_rows(x, input_scale, np.float32(1), matrix_in, K_in, False, 0, 1, there)
    sums = np.empty(0, np.float32) if has_byte_permutations() else _sums_of_blocks(turned, blocks)
    for index in prange(threads):
        begin, stop = share(index, threads, rows)
        if has_byte_permutations():
            together = rows_together(blocks, _ROWS)
            words = scratch(2, half_of(together * blocks), np.int64)
            for o in range(begin, stop, together):
                _one_by_words(codes, residual, bits, o, min(o + together, stop), turned, words, z)
        else:
            for o in range(begin, stop, 4):
                _four_by_points(codes, residual, bits, o, stop, turned, sums, z)
    turn_rows(z, output_scale, unit[0], matrix_out, K_out, True, 0, 1, y)
