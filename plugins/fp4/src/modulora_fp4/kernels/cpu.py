"""FP4 on the CPU, compiled by numba: the values of :mod:`modulora_fp4.reference`, bit for bit.

Each 32 elements are sixteen bytes of codes. They are one block of MXFP4, or two of NVFP4, so that
``shift``, the logarithm of k, is 5 or 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from modulora_kernels.cpu import (
    AHEAD,
    PAIR_ORDER,
    CPUKernels,
    as_shorts,
    jit,
    load,
    lookup_pairs,
    multiply_add,
    prefetch,
    read_ahead,
    reorder,
    share,
    splat,
    store,
    store_lookup,
    sum_of_lanes,
    table_for,
)
from numba import prange

from modulora_core.packed import PackedWeight
from modulora_fp4 import reference

_LEVELS = np.array(reference.LEVELS, np.float32)
_STEP = 32  # codes of sixteen bytes
_ORDER = np.array(PAIR_ORDER) ^ 1  # the low half of a byte is the even element
_FIRST = (_ORDER < _STEP // 2).astype(np.float32)  # 1 where it is of the first block of two
_SECOND = 1 - _FIRST


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of the functions below: codes, scales, X of each code, g or None, shift."""
    tensors, kind = packed.tensors, packed.metadata["type"]
    values, shift = reference.scale_values(kind, packed.device), reference.BLOCK[kind].bit_length()
    return tensors["codes"], tensors["scales"], values, tensors.get("global_scale"), shift - 1


@jit(borrows=True)
def _divided(number, g):
    if g is not None:
        number = number / g[0] if g[0] != 0 else np.float32(0)
    return number


@jit(borrows=True)
def _scale(scales, values, g, block):
    """X, or X / g, of a block of one row."""
    return _divided(values[scales[block]], g)


@jit(borrows=True)
def _decode_one(codes, k):
    byte = np.int32(codes[k >> 1])
    return _LEVELS[byte >> 4 if k & 1 else byte & 15]


@jit(borrows=True)
def _decode_row(codes, scales, values, g, shift, begin, end, out, to):
    """Elements ``[begin, end)`` of one row to ``out[to:]``."""
    levels, flat, i = load(_LEVELS, 0), out.reshape(out.size), begin
    while i < end:
        o = to + i - begin
        if i % _STEP or end - i < _STEP:
            flat[o] = _decode_one(codes, i) * _scale(scales, values, g, i >> shift)
            i += 1
            continue
        pairs = load(codes, i >> 1)
        index = as_shorts(pairs | ((pairs >> 4) << 16))
        X = _scale(scales, values, g, i >> shift)
        if shift == 5:
            store_lookup(out, o, table_for(out, levels * X), index)
        else:
            store_lookup(out, o, table_for(out, levels), index)
            store(out, o, load(out, o) * X)
            second = _scale(scales, values, g, (i >> shift) + 1)
            store(out, o + 16, load(out, o + 16) * second)
        i += _STEP


@jit(borrows=True)
def decode(weight, row, start, columns, out):
    """Columns ``start ...`` of the rows from ``row`` on, for :class:`CPUKernels`."""
    codes, scales, values, g, shift = weight
    for r in range(len(out)):
        own = codes[row + r]
        read_ahead(own, start >> 1, columns >> 1)
        to = r * out.shape[1]
        _decode_row(own, scales[row + r], values, g, shift, start, start + columns, out, to)


@jit(borrows=True)
def _product(codes, scales, values, shift, x):
    """Σ X P x over one row; ``x`` is in the order of lookups."""
    levels = load(_LEVELS, 0)
    a = b = splat(np.float32(0))  # an addition waits for the one before
    for k in range(0, x.size, _STEP):
        prefetch(codes, (k >> 1) + AHEAD)
        p, q = lookup_pairs(levels, load(codes, k >> 1))
        X = values[scales[k >> shift]]
        p, q = p * load(x, k), q * load(x, k + 16)
        if shift == 5:
            a, b = multiply_add(p, splat(X), a), multiply_add(q, splat(X), b)
        else:
            other = values[scales[(k >> shift) + 1]]
            of_p = load(_FIRST, 0) * X + load(_SECOND, 0) * other
            of_q = load(_FIRST, 16) * X + load(_SECOND, 16) * other
            a, b = multiply_add(p, of_p, a), multiply_add(q, of_q, b)
    return sum_of_lanes(a + b)


@jit(parallel=True)
def matmul_one(weight, threads, x, y):
    """``y = x Ŵᵀ`` for one row: levels are looked up and multiplied in registers."""
    codes, scales, values, g, shift = weight
    ordered = np.empty(x.shape[1], np.float32)
    reorder(x[0], _ORDER, ordered)
    for index in prange(threads):
        begin, stop = share(index, threads, y.shape[1])
        for row in range(begin, stop):
            total = _product(codes[row], scales[row], values, shift, ordered)
            y[0, row] = _divided(total, g)


def one_row(weight: tuple[Any, ...]) -> Any:
    """:func:`matmul_one`, if rows are whole runs of 32 elements."""
    codes = weight[0]
    return matmul_one if codes.shape[1] % (_STEP // 2) == 0 else None


kernels = CPUKernels(decode, operands, one_row)
tile, product = kernels.tile, kernels.product
