"""QuIP#'s kernels on a CPU, by numba: tiles of C, products with C, one row's whole product.

``codes`` are int16 ``[whole, blocks]``, a code for eight columns. ``residual`` is uint8 or int16
``[whole, blocks]``, or None at 2 bits. Arrays are C-contiguous.
"""

from __future__ import annotations

from typing import Any

import modulora_kernels as kernels
import numpy as np
from modulora_kernels.cpu import (
    LANES,
    CPUKernels,
    jit,
    narrow,
    on_stack,
    read_ahead,
    scratch,
    share,
)
from modulora_kernels.rotation import LARGEST_ORDER, order
from modulora_kernels.rotation.cpu import UNIT, factors, rotate_rows
from numba import prange
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_quip_sharp_e8.kernels.decoding import (
    AT_ONCE,
    NIBBLES,
    dot,
    expand,
    find_nibbles,
    room_for,
)

_MOST_CODES = 1024  # whose nibbles are found before they are used: 4 KiB of words

_words = on_stack(2 * room_for.py_func(_MOST_CODES), np.int64)
_last = on_stack(LANES * AT_ONCE, np.float32)


@jit()
def _rows_together(blocks):
    """The rows whose nibbles are found at once: a row alone may fill its last 64 codes badly."""
    return 1 if blocks % 2 else max(1, _MOST_CODES // blocks)


@jit(borrows=True)
def _expand_row(source, residual, first, end, columns, out, row, start):
    """Write so many columns of C to ``out[row, start:]``."""
    pairs = columns // (LANES * AT_ONCE) * AT_ONCE
    expand(source, residual, first, end, pairs, out, row * out.shape[1] + start)
    if pairs * LANES < columns:
        last = _last()
        step = 1 if NIBBLES else 2
        expand(source, residual, first + step * pairs, end, AT_ONCE, last, 0)
        for k in range(pairs * LANES, columns):
            out[row, start + k] = narrow(last[k - pairs * LANES], out[row, start + k])


@jit(borrows=True)
def _expand_codes(weight, row, block, columns, out):
    codes, residual = weight
    blocks = codes.shape[1]
    for r in range(len(out)):
        first = (row + r) * blocks + block
        _expand_row(codes, residual, first, first + (columns - 1) // 8, columns, out, r, 0)


@jit(borrows=True)
def _expand_nibbles(weight, row, block, columns, out):
    codes, residual = weight
    blocks, taken = codes.shape[1], (columns + 7) // 8
    words = _words().reshape(2, -1)
    together = _rows_together(blocks) if taken == blocks else 1
    for first in range(0, len(out), together):
        count = min(together, len(out) - first)
        for start in range(0, taken, _MOST_CODES):  # once, except for a longer row
            size = min(_MOST_CODES, taken - start)
            codes_at = (row + first) * blocks + block + start
            find_nibbles(codes, residual, codes_at, count * size, words)
            for r in range(count):
                width = min(8 * size, columns - 8 * start)
                at, end = r * size // 2, words.shape[1] - 1
                _expand_row(words, residual, at, end, width, out, first + r, 8 * start)


@jit(borrows=True)
def decode(weight, row, start, columns, out):
    """Columns ``start ...``, a multiple of 8, of the rows of C from ``row`` on, for CPUKernels.

    ``weight`` is codes and residual.
    """
    if NIBBLES:
        _expand_nibbles(weight, row, start // 8, columns, out)
    else:
        _expand_codes(weight, row, start // 8, columns, out)


def _codes(C: PackedWeight) -> tuple[Tensor, Tensor | None]:
    return C.tensors["codes"], C.tensors.get("residual")


_kernels = CPUKernels(decode, _codes, rounds=True)
tile, multiply = _kernels.tile, _kernels.product


# --- one row, in one call --------------------------------------------------------------------


@jit(borrows=True)
def _multiply_codes(weight, first, last, x, y):
    """``y[0, first : last] = C xᵀ``; ``x`` is 0 beyond the last block."""
    codes, residual = weight
    blocks = codes.shape[1]
    for o in range(first, last):
        read_ahead(codes, o * blocks, blocks)
        end = (o + 1) * blocks - 1
        y[0, o] = dot(codes, residual, o * blocks, end, (blocks + 1) // 2, x)


@jit(borrows=True)
def _multiply_nibbles(weight, first, last, x, words, y):
    """The same, by words."""
    codes, residual = weight
    blocks = codes.shape[1]
    together = _rows_together(blocks)
    for o in range(first, last, together):
        count = min(together, last - o)
        find_nibbles(codes, residual, o * blocks, count * blocks, words)
        for r in range(count):
            y[0, o + r] = dot(words, residual, r * blocks // 2, 0, (blocks + 1) // 2, x)


@jit(parallel=True)
def _one_row(weight, threads, x, y):
    """``y = x Ŵᵀ`` for one row, rotations included: fp32 ``[1, in]`` and ``[1, whole]``."""
    codes, residual, input_scale, output_scale, unit, M_in, K_in, M_out, K_out = weight
    rows, blocks = codes.shape
    turned, z = scratch(1, 16 * ((blocks + 1) // 2), np.float32), scratch(1, rows, np.float32)
    turned[:] = 0  # whole pairs
    there = turned.reshape(turned.size)[: x.shape[1]].reshape(1, x.shape[1])
    rotate_rows(x, input_scale, UNIT, M_in, K_in, False, 0, 1, there)
    for index in prange(threads):
        begin, stop = share(index, threads, rows)
        if NIBBLES:
            words = scratch(2, room_for(_rows_together(blocks) * blocks), np.int64)
            _multiply_nibbles((codes, residual), begin, stop, turned, words, z)
        else:
            _multiply_codes((codes, residual), begin, stop, turned, z)
    rotate_rows(z, output_scale, unit, M_out, K_out, True, 0, 1, y)


def _one_rows_weight(packed: PackedWeight) -> tuple[Any, ...]:
    tensors = packed.tensors
    whole, columns = len(tensors["output_scale"]), len(tensors["input_scale"])
    return (*_codes(packed), tensors["input_scale"], tensors["output_scale"], tensors["scale"],
            *factors(columns), *factors(whole, transpose=True))  # fmt: skip


def product_of_one(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    """``x Ŵᵀ`` for one row and the whole of a weight, in ``x``'s dtype; None for other inputs.

    Decoding a model asks for nothing else, so all of it is one call.
    """
    given, wanted = (len(packed.tensors[side]) for side in ("input_scale", "output_scale"))
    row = None if transpose or x.numel() != given else kernels.fp32_input(x, given)
    if row is None or max(map(order, (given, wanted))) > LARGEST_ORDER:
        return None
    weight = kernels.operands(packed, _one_rows_weight)
    y = kernels.product_of_one(_one_row, weight, row, wanted)
    return kernels.like_input(y, x)
