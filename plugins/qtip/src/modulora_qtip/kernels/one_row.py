"""The product of one row on a CPU, by numba, with its rotations in one call.

    x Ŵᵀ    each thread has some tiles of outputs; for four tiles of inputs at a time,
            sums of an output += values · x
    x Ŵ     each thread has some tiles of inputs; sums of an input += values · x

Bit strings are read in the order of memory, or in four streams. A product is 16 vectors for a tile
of 16 × 16 weights, whose lanes are in the order of :func:`modulora_qtip.kernels.decoding.pair`: a
pair's inputs are 0, 1, 8, 9, the same for the second output, 2, 3, 10, 11, the same, and so on.
"""

from __future__ import annotations

from typing import Any

import modulora_kernels as kernels
import numpy as np
from modulora_kernels.cpu import (
    LANES,
    jit,
    load,
    multiply_add,
    on_stack,
    scratch,
    share,
    splat,
    store,
)
from modulora_kernels.rotation import LARGEST_ORDER, order
from modulora_kernels.rotation.cpu import UNIT, factors, rotate_rows
from numba import prange
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_qtip.kernels.decoding import (
    TOGETHER,
    code_of,
    copy_tiles,
    lanes_of,
    line_of,
    pair,
    repeat_eight,
    shifts_of,
    step_of,
    walks_of,
    words_of_tiles,
)
from modulora_qtip.trellis import BLOCKS, TILE

_DEEP = 4  # tiles of inputs, whose sums stay in registers
_WIDE = TOGETHER // _DEEP
_SUMS = 8 * LANES  # of a tile's outputs: a vector for the outputs p and p + 8

_ACROSS = 128  # tiles of outputs, whose sums fill 64 KiB of stack

_sums = on_stack(_ACROSS * _SUMS, np.float32)
_vector = on_stack(LANES, np.float32)


@jit(borrows=True)
def _spread_inputs(x, out):
    """Inputs in the order of a pair's vectors: 32 numbers for 16 of ``x``."""
    for i in range(0, x.size, TILE):
        for j in range(4):  # a quarter of a vector has inputs 2 j, 2 j + 1, 2 j + 8, 2 j + 9
            for copy in range(2):
                at = 2 * i + 8 * j + 4 * copy
                out[at], out[at + 1] = x[i + 2 * j], x[i + 2 * j + 1]
                out[at + 2], out[at + 3] = x[i + 2 * j + 8], x[i + 2 * j + 9]


@jit(borrows=True)
def _spread_outputs(x, out):
    """Outputs in the order of a pair's lanes: four times p and four times p + 8, for each p."""
    for o in range(0, x.size, TILE):
        for p in range(8):
            for k in range(4):
                at = 4 * o + 8 * p + k
                out[at], out[at + 4] = x[o + p], x[o + p + 8]


@jit(borrows=True)
def _add_pair(words, before, at, shifts, lanes, code, x, x_2, total):
    one, two = pair(words, before, at, shifts, lanes, code)
    return multiply_add(two, x_2, multiply_add(one, x, total))


@jit(borrows=True)
def _add_tiles(words, place, depth, count, twice, lanes, code, x, sums, to):
    """Add products of ``depth`` tiles of inputs to ``count`` tiles of outputs, from ``to`` on.

    ``place`` is the first tile's place in ``words``, the distance to the next one of outputs and of
    inputs, and the distance from a tile to the word before it.
    """
    start, beside, below, before = place
    shifts, step = shifts_of(twice), step_of(twice)
    for j in range(count):
        at = start + j * beside
        a, b = load(sums, to), load(sums, to + LANES)
        c, d = load(sums, to + 2 * LANES), load(sums, to + 3 * LANES)
        e, f = load(sums, to + 4 * LANES), load(sums, to + 5 * LANES)
        g, h = load(sums, to + 6 * LANES), load(sums, to + 7 * LANES)
        for i in range(depth):
            y, z = load(x, 2 * TILE * i), load(x, 2 * TILE * i + LANES)
            a = _add_pair(words, at + before, at, shifts, lanes, code, y, z, a)
            b = _add_pair(words, at + step - 1, at + step, shifts, lanes, code, y, z, b)
            c = _add_pair(words, at + 2 * step - 1, at + 2 * step, shifts, lanes, code, y, z, c)
            d = _add_pair(words, at + 3 * step - 1, at + 3 * step, shifts, lanes, code, y, z, d)
            e = _add_pair(words, at + 4 * step - 1, at + 4 * step, shifts, lanes, code, y, z, e)
            f = _add_pair(words, at + 5 * step - 1, at + 5 * step, shifts, lanes, code, y, z, f)
            g = _add_pair(words, at + 6 * step - 1, at + 6 * step, shifts, lanes, code, y, z, g)
            h = _add_pair(words, at + 7 * step - 1, at + 7 * step, shifts, lanes, code, y, z, h)
            at += below
        store(sums, to, a)
        store(sums, to + LANES, b)
        store(sums, to + 2 * LANES, c)
        store(sums, to + 3 * LANES, d)
        store(sums, to + 4 * LANES, e)
        store(sums, to + 5 * LANES, f)
        store(sums, to + 6 * LANES, g)
        store(sums, to + 7 * LANES, h)
        to += _SUMS


@jit(borrows=True)
def _add_strings(weight, begin, stop, x, sums):
    """Add all products, of 2 bits: words come from the bit strings."""
    strings, twice = weight[0], weight[1]
    tiles, across, code, tile = strings.shape[0], strings.shape[1], code_of(weight), 4 * twice
    for first in range(0, tiles, _DEEP):
        depth, inputs = min(_DEEP, tiles - first), x[2 * TILE * first :]
        place = (first * across + begin) * tile, tile, across * tile, tile - 1
        _add_tiles(strings, place, depth, stop - begin, twice, None, code, inputs, sums, 0)


@jit(borrows=True)
def _add_lines(weight, begin, stop, x, sums):
    """Add all products: words come from copies."""
    strings, twice = weight[0], weight[1]
    tiles, across, words = strings.shape[0], strings.shape[1], words_of_tiles()
    code, line, lanes = code_of(weight), line_of(twice), lanes_of(twice)
    place = 1, line, _WIDE * line, -1
    for first in range(0, tiles, _DEEP):
        depth, inputs = min(_DEEP, tiles - first), x[2 * TILE * first :]
        for o in range(begin, stop, _WIDE):
            count, to = min(_WIDE, stop - o), (o - begin) * _SUMS
            for i in range(depth):
                copy_tiles(strings, (first + i) * across + o, count, 1, twice, words, _WIDE * i)
            _add_tiles(words, place, depth, count, twice, lanes, code, inputs, sums, to)


@jit(borrows=True)
def _put_outputs(sums, z):
    """``z[p]`` and ``z[p + 8]``: the sums of a vector's quarters, for the tile of ``sums``."""
    for p in range(8):
        s = sums[p * LANES : (p + 1) * LANES]
        z[p] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[8] + s[9]) + (s[10] + s[11]))
        z[p + 8] = ((s[4] + s[5]) + (s[6] + s[7])) + ((s[12] + s[13]) + (s[14] + s[15]))


@jit(borrows=True)
def _forward(weight, begin, stop, x, z):
    """``z[16 begin : 16 stop] = C x`` for inputs of :func:`_spread_inputs`."""
    sums = _sums()
    for first in range(begin, stop, _ACROSS):
        last = min(first + _ACROSS, stop)
        sums[:] = 0
        if weight[1] == 4:
            _add_strings(weight, first, last, x, sums)
        else:
            _add_lines(weight, first, last, x, sums)
        for o in range(first, last):
            _put_outputs(sums[(o - first) * _SUMS :], z[TILE * o :])


@jit(borrows=True)
def _put_inputs(total, first, z):
    """``z[first + (0, 1, 2, 3, 8, 9, 10, 11)]``: a vector's inputs, summed over two outputs."""
    s = _vector()
    store(s, 0, total)
    for half in range(2):
        for k in range(2):
            at = 8 * half + k
            z[first + 2 * half + k] = s[at] + s[at + 4]
            z[first + 2 * half + k + 8] = s[at + 2] + s[at + 6]


@jit(borrows=True)
def _add_outputs(words, place, count, twice, lanes, code, x, totals):
    """Add products of ``count`` tiles of outputs to the four sums of a tile of inputs."""
    start, beside, before = place
    a, b, c, d = totals
    shifts, step = shifts_of(twice), step_of(twice)
    for j in range(count):
        at, of = start + j * beside, 4 * TILE * j
        last = at + before
        for p in range(0, 8, 2):
            y = repeat_eight(x, of + 8 * p, a)
            one, two = pair(words, last, at, shifts, lanes, code)
            a, b = multiply_add(one, y, a), multiply_add(two, y, b)
            y = repeat_eight(x, of + 8 * p + 8, a)
            one, two = pair(words, at + step - 1, at + step, shifts, lanes, code)
            c, d = multiply_add(one, y, c), multiply_add(two, y, d)
            last, at = at + 2 * step - 1, at + 2 * step
    return a, b, c, d


@jit(borrows=True)
def _sums_of_strings(weight, i, x):
    """The four sums of tile ``i`` of inputs, of 2 bits: words come from the bit strings."""
    strings, twice, zero = weight[0], weight[1], splat(np.float32(0))
    across, tile = strings.shape[1], 4 * twice
    place = i * across * tile, tile, tile - 1
    totals = zero, zero, zero, zero
    return _add_outputs(strings, place, across, twice, None, code_of(weight), x, totals)


@jit(borrows=True)
def _sums_of_lines(weight, i, x):
    """The four sums of tile ``i`` of inputs: words come from copies."""
    strings, twice, zero = weight[0], weight[1], splat(np.float32(0))
    across, words, code = strings.shape[1], words_of_tiles(), code_of(weight)
    lanes, place = lanes_of(twice), (1, line_of(twice), -1)
    totals = zero, zero, zero, zero
    for first in range(0, across, TOGETHER):
        count, outputs = min(TOGETHER, across - first), x[4 * TILE * first :]
        copy_tiles(strings, i * across + first, count, 1, twice, words, 0)
        totals = _add_outputs(words, place, count, twice, lanes, code, outputs, totals)
    return totals


@jit(borrows=True)
def _transposed(weight, begin, stop, x, z):
    """``z[16 begin : 16 stop] = Cᵀ x`` for outputs of :func:`_spread_outputs`."""
    for i in range(begin, stop):
        if weight[1] == 4:
            a, b, c, d = _sums_of_strings(weight, i, x)
        else:
            a, b, c, d = _sums_of_lines(weight, i, x)
        _put_inputs(a + c, TILE * i, z)
        _put_inputs(b + d, TILE * i + 4, z)


@jit(parallel=True)
def _one_row(weight, threads, x, y):
    """``y = x Ŵᵀ``, or ``x Ŵ``, for one row: fp32 ``[1, P(in)]`` and ``[1, P(out)]``, or turned."""
    s, unit, M, K, s_2, unit_2, M_2, K_2, walks, transpose = weight
    inputs, outputs = TILE * walks[0].shape[0], TILE * walks[0].shape[1]
    given, wanted = (outputs, inputs) if transpose else (inputs, outputs)
    turned = scratch(1, given, np.float32)
    spread, z = scratch(1, 4 * given, np.float32), scratch(1, wanted, np.float32)
    turned[:] = 0
    there = turned.reshape(turned.size)[: s.size].reshape(1, s.size)
    rotate_rows(x, s, unit, M, K, False, 0, 1, there)
    if transpose:
        _spread_outputs(turned[0], spread[0])
    else:
        _spread_inputs(turned[0], spread[0])
    for index in prange(threads):
        begin, stop = share(index, threads, wanted // TILE)
        if transpose:
            _transposed(walks, begin, stop, spread[0], z[0])
        else:
            _forward(walks, begin, stop, spread[0], z[0])
    back = z.reshape(z.size)[: s_2.size].reshape(1, s_2.size)
    rotate_rows(back, s_2, unit_2, M_2, K_2, True, 0, 1, y)


def _weight(packed: PackedWeight, transpose: bool) -> tuple[Any, ...]:
    tensors, block = packed.tensors, BLOCKS[packed.metadata["hadamard"]]
    suh, svh = tensors["suh"], tensors["svh"]
    inputs, outputs = (suh, UNIT), (svh, tensors.get("scale", UNIT))
    before, after = (outputs, inputs) if transpose else (inputs, outputs)
    return (*before, *factors(len(before[0]), block), *after, *factors(len(after[0]), block, True),
            walks_of(packed), transpose)  # fmt: skip


def _forward_weight(packed: PackedWeight) -> tuple[Any, ...]:
    return _weight(packed, False)


def _transposed_weight(packed: PackedWeight) -> tuple[Any, ...]:
    return _weight(packed, True)


def product(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    """``x Ŵᵀ``, or ``x Ŵ``, for one row, in ``x``'s dtype; None for other inputs.

    Decoding a model asks for nothing else, so all of it is one call.
    """
    inputs, outputs = len(packed.tensors["suh"]), len(packed.tensors["svh"])
    given, wanted = (outputs, inputs) if transpose else (inputs, outputs)
    row = kernels.fp32_input(x, given) if x.numel() == given else None
    full = BLOCKS[packed.metadata["hadamard"]] is None
    if row is None or (full and max(order(inputs), order(outputs)) > LARGEST_ORDER):
        return None
    make = _transposed_weight if transpose else _forward_weight
    y = kernels.product_of_one(_one_row, kernels.operands(packed, make), row, wanted)
    return kernels.like_input(y, x)
