"""INT8 on the CPU, compiled by numba: the values of :mod:`modulora_int8.reference`, bit for bit.

``codes`` are int8 ``[out, in]``, ``scales`` fp32 ``[out, groups]``; ``group`` columns share a
scale.

Imitate this module if your codes are whole bytes. A quantizer needs `operands`, `decode` and the
lines that make `tile` and `product`, nothing more. Add `matmul_one` if decoding a token must be
fast, and `quantize` if plain torch packs slowly.

Do not imitate it if several codes share a byte: loads of single codes would take most of the time.
See plugins/nf4 for 16 levels, plugins/optq for bit planes, and plugins/gguf for structs of bytes.
Do not imitate it for a rotated weight either: plugins/quip-sharp-e8 rotates the inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from modulora_kernels.cpu import (
    AHEAD,
    CPUKernels,
    add_in_turn,
    four_sums,
    jit,
    largest_bits,
    load,
    narrow,
    prefetch,
    read_ahead,
    share,
    signed,
    store_rounded,
    sum_of_four,
    to_floats,
)
from numba import prange

from modulora_core.packed import PackedWeight
from modulora_int8 import reference

_INVERSE, _LARGEST = np.float32(reference.INVERSE), np.float32(reference.LARGEST)
_SMALLEST = np.float32(reference.SMALLEST_ABSMAX)
_FROM, _BELOW = (np.float32(end) for end in reference.HALF_RANGE)
_TO_WHOLE = np.float32(1.5 * 2**23)  # added to less than 2²², it leaves no digits after the point

_ROWS = 16  # rows that a thread quantizes at once


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of the functions below: codes, scales, columns of a group."""
    group = packed.metadata["group_size"] or max(1, packed.shape[1])
    return packed.tensors["codes"], packed.tensors["scales"], group


@jit(borrows=True)
def decode(weight, row, start, columns, out):
    """Columns ``start ...`` of the rows from ``row`` on, for :class:`CPUKernels`."""
    codes, scales, group = weight
    for r in range(len(out)):
        at, to = (row + r) * codes.shape[1] + start, r * out.shape[1]
        read_ahead(codes, at, columns)
        k, g = 0, start // group
        while k < columns:
            end, scale = min(columns, (g + 1) * group - start), scales[row + r, g]
            runs = (end - k) >> 6
            whole = k + 64 * runs
            for run in range(runs):
                for half in range(2):
                    j = k + 64 * run + 32 * half
                    low, high = to_floats(load(codes, at + j)), to_floats(load(codes, at + j + 16))
                    store_rounded(out, to + j, low * scale * _INVERSE, high * scale * _INVERSE)
            for j in range(whole, end):
                value = np.float32(codes[row + r, start + j]) * scale * _INVERSE
                out[r, j] = narrow(value, out[r, j])
            k, g = end, g + 1


@jit(borrows=True)
def _product(codes, row, scales, group, x):
    """Σ_g scale[g] Σ_k code[k] x[k], over the columns k of group g of a row."""
    total, columns = np.float32(0), codes.shape[1]
    begin = row * columns
    for g in range(scales.shape[1]):
        start, stop = g * group, min((g + 1) * group, columns)
        sums, turns = four_sums(), (stop - start) >> 6
        whole = start + 64 * turns
        for turn in range(turns):
            k = start + 64 * turn
            at = begin + k
            prefetch(codes, at + AHEAD)
            sums = add_in_turn(to_floats(load(codes, at)), load(x, k), sums)
            sums = add_in_turn(to_floats(load(codes, at + 16)), load(x, k + 16), sums)
            sums = add_in_turn(to_floats(load(codes, at + 32)), load(x, k + 32), sums)
            sums = add_in_turn(to_floats(load(codes, at + 48)), load(x, k + 48), sums)
        of_group = sum_of_four(sums)
        for k in range(whole, stop):
            of_group += np.float32(codes[row, k]) * x[0, k]
        total += of_group * scales[row, g]
    return total * _INVERSE


@jit(parallel=True)
def matmul_one(weight, threads, x, y):
    """``y = x Ŵᵀ`` for one row: codes are multiplied as they are, and the sums of groups scaled."""
    codes, scales, group = weight
    for index in prange(threads):
        begin, stop = share(index, threads, len(codes))
        for o in range(begin, stop):
            y[0, o] = _product(codes, o, scales, group, x)


kernels = CPUKernels(decode, operands, lambda _: matmul_one, rounds=True)
tile, product = kernels.tile, kernels.product


@jit(borrows=True)
def _through_half(x):
    """An fp32 number below 65520 rounded to fp16, to nearest and halves to even."""
    bits = np.float32(x).view(np.int32)
    rounded = np.int32((bits + np.int32(0xFFF) + ((bits >> 13) & 1)) & np.int32(~0x1FFF))
    # below 2⁻¹⁴ the steps are 2⁻²⁴, as in fp32 between 0.5 and 1
    small = np.float32((x + np.float32(0.75)) - np.float32(0.75))
    return small if abs(x) < np.float32(2.0**-14) else rounded.view(np.float32)


@jit(borrows=True)
def _quantize_group(x, bits, codes):
    """Codes of the numbers ``x``, whose bits are ``bits``; returns their scale."""
    c = np.int32(largest_bits(bits)).view(np.float32)
    in_halves = _FROM <= c < _BELOW
    if in_halves:
        c = _through_half(c)
    factor = np.float32(1) / max(c, _SMALLEST) * _LARGEST
    for k in range(codes.size):
        value = _through_half(x[k]) if in_halves else x[k]
        codes[k] = np.int8(np.int32((value * factor + _TO_WHOLE) - _TO_WHOLE))
    return c


@jit(parallel=True)
def quantize(x, group, codes, scales):
    """Codes and scales of the fp32 weight: :func:`modulora_int8.reference.quantize`."""
    bits, columns = x.view(np.int32), x.shape[1]
    for piece in prange((len(x) + _ROWS - 1) // _ROWS):
        first = signed(piece) * _ROWS
        for o in range(first, min(first + _ROWS, len(x))):
            for g in range(scales.shape[1]):
                a, b = g * group, min((g + 1) * group, columns)
                scales[o, g] = _quantize_group(x[o, a:b], bits[o, a:b], codes[o, a:b])
