"""NF4 on the CPU, compiled by numba: the values of :mod:`modulora_nf4.reference`, bit for bit.

Kernels work on the flat, row-major weight: element ``i`` is in block ``i >> shift`` and byte
``i >> 1``. A row may start in the middle of either. ``absmax`` is the fp32 constant of each
block; with double quantization a kernel computes the constants of some blocks at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from modulora_kernels.cpu import (
    AHEAD,
    PAIR_ORDER,
    CPUKernels,
    add_in_turn,
    as_shorts,
    four_sums,
    jit,
    largest_bits,
    load,
    lookup_pairs,
    multiply_add,
    narrow,
    on_stack,
    prefetch,
    read_ahead,
    reorder,
    share,
    splat,
    store_lookup,
    sum_of_four,
    table_for,
)
from numba import prange

from modulora_core.packed import PackedWeight
from modulora_nf4.reference import (
    LEVELS,
    NESTED_BLOCK_SIZE,
    SMALLEST_ABSMAX,
    ZERO,
    dynamic_map,
)

_LEVELS = np.array(LEVELS, np.float32)
_MIDPOINTS = tuple((_LEVELS[1:] + _LEVELS[:-1]) / np.float32(2))
_DYNAMIC_MAP = dynamic_map().numpy()
_SMALLEST = np.float32(SMALLEST_ABSMAX)

_STEP = 32  # codes of sixteen bytes
_ORDER = np.array(PAIR_ORDER)
_PIECE = 8192  # elements that a thread quantizes at once
_ROWS = 16  # whose constants are computed at once, where they are quantized too

_room = on_stack(1024, np.float32)  # constants of as many blocks


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of the functions below.

    Codes; c₂ or None; q₂, c₁ and the mean, or None; shift; the length of a row.
    """
    names = ("codes", "absmax", "absmax_codes", "nested_absmax", "offset")
    tensors = (packed.tensors.get(name) for name in names)
    return *tensors, packed.metadata["block_size"].bit_length() - 1, packed.shape[1]


@jit(borrows=True)
def _scale_map(codes, constant, offset, out):
    for k in range(out.size):
        out[k] = _DYNAMIC_MAP[codes[k]] * constant + offset


@jit(borrows=True)
def _put_constants(q2, c1, mean, first, out):
    """The constants c₂ of blocks ``first ...`` to all of ``out``."""
    i = 0
    while i < out.size:
        number = (first + i) // NESTED_BLOCK_SIZE
        end = min(out.size, (number + 1) * NESTED_BLOCK_SIZE - first)
        _scale_map(q2[first + i : first + end], c1[number], mean[0], out[i:end])
        i = end


@jit(borrows=True)
def _decode_runs(codes, byte, runs, table, out, to):
    """``runs`` times 64 elements of one block, whose values are in ``table``."""
    for run in range(runs):
        for half in range(2):
            pairs = load(codes, byte + 32 * run + 16 * half)
            index = as_shorts((pairs >> 4) | (pairs << 16))  # the high half of a byte comes first
            store_lookup(out, to + 64 * run + 32 * half, table, index)


@jit(borrows=True)
def _decode_blocks(codes, byte, absmax, block, shift, blocks, out, to):
    """Whole blocks of 64 elements or more: each of 16 values is computed, and rounded, once."""
    levels = load(_LEVELS, 0)
    for k in range(blocks):
        table = table_for(out, levels * absmax[block + k])
        at, begin = byte + (k << shift >> 1), to + (k << shift)
        _decode_runs(codes, at, 1 << shift >> 6, table, out, begin)


@jit(borrows=True)
def _decode_rest(codes, absmax, first, shift, start, stop, out, to):
    """Elements ``[start, stop)`` of any blocks; ``absmax`` begins with block ``first``."""
    i, flat, levels = start, out.reshape(out.size), load(_LEVELS, 0)
    while i < stop:
        scale, end = absmax[(i >> shift) - first], min(stop, ((i >> shift) + 1) << shift)
        runs = 0 if i & 1 else (end - i) >> 6
        _decode_runs(codes, i >> 1, runs, table_for(out, levels * scale), out, to + i - start)
        for k in range(i + 64 * runs, end):
            byte, o = np.int32(codes[k >> 1]), to + k - start
            flat[o] = narrow(_LEVELS[byte & 15 if k & 1 else byte >> 4] * scale, flat[o])
        i = end


@jit(borrows=True)
def _decode_row(codes, c2, q2, c1, mean, shift, begin, end, out, to):
    """Elements ``[begin, end)`` to ``out[to:]``."""
    room, i = _room(), begin
    while i < end:
        if q2 is None:
            constants, first, stop = c2, 0, end
        else:
            first = i >> shift
            stop = min(end, (first + room.size) << shift)
            constants = room[: ((stop - 1) >> shift) + 1 - first]
            _put_constants(q2, c1, mean, first, constants)
        is_whole = shift >= 6 and i & ((1 << shift) - 1) == 0
        blocks = (stop - i) >> shift if is_whole else 0
        o = to + i - begin
        _decode_blocks(codes, i >> 1, constants, (i >> shift) - first, shift, blocks, out, o)
        done = blocks << shift
        if i + done < stop:
            _decode_rest(codes, constants, first, shift, i + done, stop, out, o + done)
        i = stop


@jit(borrows=True)
def decode(weight, row, start, columns, out):
    """Columns ``start ...`` of the rows from ``row`` on, for :class:`CPUKernels`."""
    codes, c2, q2, c1, mean, shift, in_features = weight
    for r in range(len(out)):
        begin = (row + r) * in_features + start
        read_ahead(codes, begin >> 1, columns >> 1)
        to = r * out.shape[1]
        _decode_row(codes, c2, q2, c1, mean, shift, begin, begin + columns, out, to)


@jit(borrows=True)
def _add_run(levels, codes, at, x, k, scale, sums):
    """Add the products of 32 elements from ``at`` on; ``x`` is in the order of lookups."""
    a, b = lookup_pairs(levels, load(codes, at >> 1))
    products = multiply_add(b, load(x, k + 16), a * load(x, k))
    return add_in_turn(products, splat(scale), sums)


@jit(borrows=True)
def _product(codes, absmax, first, shift, x, start):
    """Σ level[code] absmax x over a row; ``absmax`` begins with block ``first``."""
    levels, scales, columns = load(_LEVELS, 0), absmax, x.size
    sums, turns = four_sums(), columns >> 7
    for turn in range(turns):
        k = 128 * turn
        i = start + k
        prefetch(codes, (i >> 1) + AHEAD)
        sums = _add_run(levels, codes, i, x, k, scales[(i >> shift) - first], sums)
        sums = _add_run(levels, codes, i + 32, x, k + 32, scales[(i + 32 >> shift) - first], sums)
        sums = _add_run(levels, codes, i + 64, x, k + 64, scales[(i + 64 >> shift) - first], sums)
        sums = _add_run(levels, codes, i + 96, x, k + 96, scales[(i + 96 >> shift) - first], sums)
    for k in range(128 * turns, columns, _STEP):
        i = start + k
        sums = _add_run(levels, codes, i, x, k, scales[(i >> shift) - first], sums)
    return sum_of_four(sums)


@jit(borrows=True)
def _products(codes, c2, q2, c1, mean, shift, x, begin, stop, room, y):
    """Products of ``x`` with rows ``[begin, stop)`` of Ŵ."""
    for o in range(begin, stop, _ROWS):
        last = min(o + _ROWS, stop)
        if q2 is None:
            constants, first = c2, 0
        else:
            first = o * x.size >> shift
            constants = room[: (last * x.size - 1 >> shift) + 1 - first]
            _put_constants(q2, c1, mean, first, constants)
        for row in range(o, last):
            y[0, row] = _product(codes, constants, first, shift, x, row * x.size)


@jit(parallel=True)
def matmul_one(weight, threads, x, y):
    """``y = x Ŵᵀ`` for one row: levels are looked up and multiplied in registers."""
    codes, c2, q2, c1, mean, shift, columns = weight
    ordered = np.empty(columns, np.float32)
    reorder(x[0], _ORDER, ordered)
    for index in prange(threads):
        begin, stop = share(index, threads, y.shape[1])
        room = np.empty((_ROWS * columns >> shift) + 2, np.float32)
        _products(codes, c2, q2, c1, mean, shift, ordered, begin, stop, room, y)


def one_row(weight: tuple[Any, ...]) -> Any:
    """:func:`matmul_one`, if no row and no block begins inside of 32 elements."""
    *_, shift, columns = weight
    return matmul_one if columns % _STEP == 0 and 1 << shift >= _STEP else None


kernels = CPUKernels(decode, operands, one_row, rounds=True)
tile, product = kernels.tile, kernels.product


@jit(borrows=True)
def _nearest(x, factor, codes):
    """The number of midpoints strictly below ``x * factor``: a tie takes the lower level."""
    for k in range(codes.size):
        v, code = x[k] * factor, np.int32(0)
        for midpoint in _MIDPOINTS:
            code += np.int32(v > midpoint)
        codes[k] = code


@jit(borrows=True)
def _in_pairs(q, codes):
    for k in range(codes.size):
        codes[k] = (q[2 * k] << 4) | q[2 * k + 1]


@jit(parallel=True)
def quantize(x, shift, codes, absmax):
    """Bytes and block constants of the flat weight: :func:`modulora_nf4.reference.quantize`."""
    block = 1 << shift
    size = max(block, _PIECE)  # even: pieces share no byte
    x_bits, absmax_bits = x.view(np.int32), absmax.view(np.int32)
    for piece in prange((x.size + size - 1) // size):
        begin, stop = piece * size, min((piece + 1) * size, x.size)
        q = np.empty(stop - begin + 1, np.uint8)
        q[stop - begin] = ZERO  # fills the last byte of an odd number of elements
        for a in range(begin, stop, block):
            b, g = min(a + block, stop), a >> shift
            absmax_bits[g] = largest_bits(x_bits[a:b])
            largest = max(absmax[g], _SMALLEST)
            if b - a == block:
                _nearest(x[a:b], np.float32(1) / largest, q[a - begin : b - begin])
            else:  # bitsandbytes divides in a short block, and stores the divisor
                absmax[g] = largest
                _nearest(x[a:b] / largest, np.float32(1), q[a - begin : b - begin])
        _in_pairs(q, codes[begin >> 1 : (stop + 1) >> 1])
