"""QTIP's kernels on a CPU, by numba: tiles of C, products with C, one row's whole product.

``strings`` are int16 ``[inputs / 16, outputs / 16, 16 K]``, the bit strings of tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from torch import Tensor

from modulora_core import kernels
from modulora_core.kernels.cpu import (
    LANES,
    CPUKernels,
    jit,
    load,
    multiply_add,
    on_stack,
    scratch,
    share,
    splat,
    store,
)
from modulora_core.kernels.rotation import LARGEST_ORDER, order
from modulora_core.kernels.rotation.cpu import UNIT, factors, rotate_rows
from modulora_core.packed import PackedWeight
from modulora_qtip.codes import CODES
from modulora_qtip.kernels.decoding import (
    copy_tiles,
    geometry,
    high_column,
    line_of,
    low_column,
    pair,
)
from modulora_qtip.trellis import BLOCKS, TILE

_TOGETHER = 64  # tiles whose words are copied at once: at most 20 KiB

_words = on_stack(_TOGETHER * line_of.py_func(8), np.float32)
_vector = on_stack(LANES, np.float32)
_KINDS = {"bytes": None, "halves": np.int32(0), "fused": np.float32(0)}


@jit(borrows=True)
def _function(mask: Any, multiplier: Any, addend: Any, kind: Any) -> Any:
    zero = load(_ZEROS, 0)
    return zero + mask, zero + multiplier, zero + addend, kind


_ZEROS = np.zeros(LANES, np.int32)


@jit(borrows=True)
def _put(values: Any, row: int, start: int, out: Any) -> None:
    if 0 <= row < out.shape[0]:
        store(out, row * out.shape[1] + start, values)


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...``, multiples of 16, of the rows of C from ``row`` on, for CPUKernels."""
    strings, K, mask, multiplier, addend, kind = weight
    across, words = strings.shape[1], _words()
    places, function = geometry(K), _function(mask, multiplier, addend, kind)
    for b in range(row // TILE, (row + len(out) + TILE - 1) // TILE):
        for first in range(0, columns // TILE, _TOGETHER):
            count = min(_TOGETHER, columns // TILE - first)
            copy_tiles(strings, (start // TILE + first) * across + b, count, across, K, words)
            for i in range(count):
                at = (first + i) * TILE
                for p in range(8):
                    one, two = pair(words, i * line_of(K) + p * K, K, places, function)
                    o = b * TILE + p - row
                    _put(low_column(one, two), o, at, out)
                    _put(high_column(one, two), o + 8, at, out)


def _walks(C: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of :func:`decode`."""
    facts = C.metadata
    function = CODES[facts["code"]]
    multiplier = np.uint32(function.multiplier).view(np.int32)
    mask = np.int32((1 << facts["states"]) - 1)
    return (C.tensors["trellis"], facts["bits"], mask, multiplier, np.int32(function.addend),
            _KINDS[function.kind])  # fmt: skip


_kernels = CPUKernels(decode, _walks)
tile, multiply = _kernels.tile, _kernels.product


# --- one row, in one call --------------------------------------------------------------------


@jit(borrows=True)
def _spread(x: Any, out: Any) -> None:
    """Inputs in the order of a pair's vectors: 32 numbers for 16 of ``x``."""
    for i in range(0, x.size, TILE):
        for j in range(4):  # a quarter of a vector has inputs 2 j, 2 j + 1, 2 j + 8, 2 j + 9
            for copy in range(2):
                at = 2 * i + 8 * j + 4 * copy
                out[at], out[at + 1] = x[i + 2 * j], x[i + 2 * j + 1]
                out[at + 2], out[at + 3] = x[i + 2 * j + 8], x[i + 2 * j + 9]


@jit(borrows=True)
def _add_pair(
    words: Any, at: int, K: int, places: Any, function: Any, x: Any, x_2: Any, total: Any
) -> Any:
    one, two = pair(words, at, K, places, function)
    return multiply_add(two, x_2, multiply_add(one, x, total))


@jit(borrows=True)
def _finish(total: Any, z: Any, at: int) -> None:
    lanes = _vector()
    store(lanes, 0, total)
    z[at] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
        (lanes[8] + lanes[9]) + (lanes[10] + lanes[11])
    )
    z[at + 8] = ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7])) + (
        (lanes[12] + lanes[13]) + (lanes[14] + lanes[15])
    )


@jit(borrows=True)
def _multiply(weight: Any, begin: int, stop: int, x: Any, z: Any) -> None:
    """``z[16 begin : 16 stop] = C x`` for inputs of :func:`_spread`."""
    strings, K, mask, multiplier, addend, kind = weight
    tiles, across, words = strings.shape[0], strings.shape[1], _words()
    places, function = geometry(K), _function(mask, multiplier, addend, kind)
    line = line_of(K)
    for o in range(begin, stop):
        a = b = c = d = e = f = g = h = splat(np.float32(0))
        for first in range(0, tiles, _TOGETHER):
            count = min(_TOGETHER, tiles - first)
            copy_tiles(strings, first * across + o, count, across, K, words)
            for i in range(count):
                at, of = i * line, 2 * TILE * (first + i)
                y, y_2 = load(x, of), load(x, of + LANES)
                a = _add_pair(words, at, K, places, function, y, y_2, a)
                b = _add_pair(words, at + K, K, places, function, y, y_2, b)
                c = _add_pair(words, at + 2 * K, K, places, function, y, y_2, c)
                d = _add_pair(words, at + 3 * K, K, places, function, y, y_2, d)
                e = _add_pair(words, at + 4 * K, K, places, function, y, y_2, e)
                f = _add_pair(words, at + 5 * K, K, places, function, y, y_2, f)
                g = _add_pair(words, at + 6 * K, K, places, function, y, y_2, g)
                h = _add_pair(words, at + 7 * K, K, places, function, y, y_2, h)
        _finish(a, z, TILE * o)
        _finish(b, z, TILE * o + 1)
        _finish(c, z, TILE * o + 2)
        _finish(d, z, TILE * o + 3)
        _finish(e, z, TILE * o + 4)
        _finish(f, z, TILE * o + 5)
        _finish(g, z, TILE * o + 6)
        _finish(h, z, TILE * o + 7)


@jit(parallel=True)
def _one_row(weight: Any, threads: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, rotations included: fp32 ``[1, in]`` and ``[1, out]``."""
    walks, suh, svh, unit, M_in, K_in, M_out, K_out = weight
    tiles, across = walks[0].shape[0], walks[0].shape[1]
    turned, z = scratch(1, TILE * tiles, np.float32), scratch(1, TILE * across, np.float32)
    spread = scratch(1, 2 * turned.size, np.float32)
    padded, result = scratch(1, suh.size, np.float32), scratch(1, svh.size, np.float32)
    padded[:] = 0
    padded[0, : x.shape[1]] = x[0]
    turned[:] = 0
    there = turned.reshape(turned.size)[: suh.size].reshape(1, suh.size)
    rotate_rows(padded, suh, UNIT, M_in, K_in, False, 0, 1, there)
    _spread(turned[0], spread[0])
    for index in prange(threads):
        begin, stop = share(index, threads, across)
        _multiply(walks, begin, stop, spread, z[0])
    back = z.reshape(z.size)[: svh.size].reshape(1, svh.size)
    rotate_rows(back, svh, unit, M_out, K_out, True, 0, 1, result)
    y[0] = result[0, : y.shape[1]]


def _one_rows_weight(packed: PackedWeight) -> tuple[Any, ...]:
    tensors, block = packed.tensors, BLOCKS[packed.metadata["hadamard"]]
    suh, svh = tensors["suh"], tensors["svh"]
    return (_walks(packed), suh, svh, tensors.get("scale", UNIT),
            *factors(len(suh), block), *factors(len(svh), block, True))  # fmt: skip


def product_of_one(x: Tensor, packed: PackedWeight) -> Tensor | None:
    """``x Ŵᵀ`` for one row, in ``x``'s dtype; None for other inputs.

    Decoding a model asks for nothing else, so all of it is one call.
    """
    wanted, given = packed.shape
    row = kernels.fp32_input(x, given) if x.numel() == given else None
    sides = packed.tensors["suh"], packed.tensors["svh"]
    full = BLOCKS[packed.metadata["hadamard"]] is None
    if row is None or (full and max(order(len(side)) for side in sides) > LARGEST_ORDER):
        return None
    y = kernels.product_of_one(_one_row, kernels.operands(packed, _one_rows_weight), row, wanted)
    return kernels.like_input(y, x)
