"""Common types on the CPU, compiled by numba: the values of the reference, bit for bit.

Other types are decoded by :mod:`modulora_gguf.reference`, after one line in the log.

``blocks`` are uint8 ``[out, row bytes]``; each has ``size`` weights in ``nbytes`` bytes.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from modulora_kernels.cpu import (
    AHEAD,
    CPUKernels,
    add_in_turn,
    four_sums,
    from_half,
    jit,
    load,
    lookup,
    multiply_add,
    on_stack,
    prefetch,
    share,
    splat,
    store,
    sum_of_four,
    to_floats,
)
from numba import literal_unroll, prange
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_gguf import codebooks, reference

KINDS = {
    name: kind
    for kind, name in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"))
}
"""The types with kernels, and their numbers."""

_Q4_0, _Q4_1, _Q5_0, _Q8_0, _Q4_K, _Q5_K, _Q6_K, _ = KINDS.values()
_IQ4 = codebooks.lookup("IQ4_NL", torch.arange(16, device="cpu")).numpy()

_NUMBERS = tuple(KINDS.values())
_0 = np.float32(0)
_LANES = np.arange(16, dtype=np.int32)

_whole = on_stack(256, np.float32)


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of the functions below: blocks, kind, weights and bytes of a block."""
    kind = packed.metadata["type"]
    return packed.tensors["blocks"], KINDS[kind], *reference.block_of(kind)


@jit(borrows=True)
def _byte(b, at):
    return b[np.uint64(at)]  # a signed index might be negative, which costs time


@jit(borrows=True)
def _half(b, at):
    number = from_half(np.int16(np.uint16(_byte(b, at)) | np.uint16(_byte(b, at + 1)) << 8))
    return number if abs(number) < np.float32(65536) else _0  # as reference.half


@jit(borrows=True)
def _take(codes, scale, minimum, out, x, k, sums):
    """Store sixteen weights in ``out[k ...]``; without it, add their products with ``x[k ...]``."""
    if out is None:
        values = multiply_add(codes, splat(scale), splat(-minimum))
        return add_in_turn(values, load(x, k), sums)
    store(out, k, codes * scale - minimum)
    return sums


@jit(borrows=True)
def _q4_0(b, at, out, x, k, sums):
    d, qs = _half(b, at), load(b, at + 2)
    sums = _take(to_floats((qs & 15) - 8), d, _0, out, x, k, sums)
    return _take(to_floats((qs >> 4) - 8), d, _0, out, x, k + 16, sums)


@jit(borrows=True)
def _q4_1(b, at, out, x, k, sums):
    d, m, qs = _half(b, at), _half(b, at + 2), load(b, at + 4)
    sums = _take(to_floats(qs & 15), d, -m, out, x, k, sums)
    return _take(to_floats(qs >> 4), d, -m, out, x, k + 16, sums)


@jit(borrows=True)
def _fifth_bits(b, at):
    """Sixteen bits of two bytes, as bits of 16."""
    bits = np.int32(_byte(b, at)) | np.int32(_byte(b, at + 1)) << 8
    return (splat(bits) >> load(_LANES, 0) & 1) << 4


@jit(borrows=True)
def _q5_0(b, at, out, x, k, sums):
    d, qs = _half(b, at), load(b, at + 6)
    sums = _take(to_floats(((qs & 15) | _fifth_bits(b, at + 2)) - 16), d, _0, out, x, k, sums)
    return _take(to_floats(((qs >> 4) | _fifth_bits(b, at + 4)) - 16), d, _0, out, x, k + 16, sums)


@jit(borrows=True)
def _q8_0(b, at, out, x, k, sums):
    d = _half(b, at)
    for part in (0, 16):
        codes = load(b, at + 2 + part)
        signed = (codes & 127) - (codes & 128)  # the sign bit counts -128
        sums = _take(to_floats(signed), d, _0, out, x, k + part, sums)
    return sums


@jit(borrows=True)
def _affine_k(b, at, part):
    """The scale and the minimum of one of the eight parts of Q4_K and Q5_K, without d and dmin."""
    if part < 4:
        sc, m = _byte(b, at + 4 + part) & 63, _byte(b, at + 8 + part) & 63
    else:
        high = _byte(b, at + 8 + part)
        sc = (high & 15) | (_byte(b, at + part) >> 2 & 48)
        m = (high >> 4) | (_byte(b, at + 4 + part) >> 2 & 48)
    return np.float32(sc), np.float32(m)


@jit(borrows=True)
def _q4_or_q5_k(fifth, b, at, out, x, k, sums):
    """Q4_K; with ``fifth`` bits Q5_K. A byte has codes of two parts."""
    d, dmin, qs = _half(b, at), _half(b, at + 2), at + (48 if fifth else 16)
    for pair in range(4):
        sc, m = _affine_k(b, at, 2 * pair)
        other_sc, other_m = _affine_k(b, at, 2 * pair + 1)
        for j in (0, 16):
            codes, to = load(b, qs + 32 * pair + j), k + 64 * pair + j
            low, high = codes & 15, codes >> 4
            if fifth:
                bits = load(b, at + 16 + j) >> 2 * pair
                low, high = low | (bits & 1) << 4, high | (bits & 2) << 3
            sums = _take(to_floats(low), d * sc, dmin * m, out, x, to, sums)
            sums = _take(to_floats(high), d * other_sc, dmin * other_m, out, x, to + 32, sums)
    return sums


@jit(borrows=True)
def _q6_k(b, at, out, x, k, sums):
    """Sixteen bytes of high bits go with 64 weights, in four parts."""
    d = _half(b, at + 208)
    for j in (0, 16, 128, 144):  # the weight that comes first
        ql, scales = at + (j & 16) + (j & 128) // 2, at + 192 + j // 16
        a, c, qh = load(b, ql), load(b, ql + 32), load(b, at + 128 + (j & 16) + (j & 128) // 4)
        for run in range(4):
            low = (c if run & 1 else a) >> 4 * (run >> 1) & 15
            codes = low | (qh >> 2 * run & 3) << 4
            scale = d * np.float32(np.int8(_byte(b, scales + 2 * run)))
            sums = _take(to_floats(codes - 32), scale, _0, out, x, k + j + 32 * run, sums)
    return sums


@jit(borrows=True)
def _iq4_xs(b, at, out, x, k, sums):
    d, table = _half(b, at), load(_IQ4, 0)
    for part in range(8):
        low = np.int32(_byte(b, at + 4 + (part >> 1)) >> 4 * (part & 1) & 15)
        high = np.int32(_byte(b, at + 2 + (part >> 2)) >> 2 * (part & 3) & 3)
        scale, qs = d * np.float32((low | high << 4) - 32), load(b, at + 8 + 16 * part)
        sums = _take(lookup(table, qs), scale, _0, out, x, k + 32 * part, sums)
        sums = _take(lookup(table, qs >> 4), scale, _0, out, x, k + 32 * part + 16, sums)
    return sums


@jit(borrows=True)
def _block(kind, b, at, out, x, k, sums):
    """:func:`_take` all weights of the block at ``b[at]``."""
    if kind == _Q4_0:
        return _q4_0(b, at, out, x, k, sums)
    if kind == _Q4_1:
        return _q4_1(b, at, out, x, k, sums)
    if kind == _Q5_0:
        return _q5_0(b, at, out, x, k, sums)
    if kind == _Q8_0:
        return _q8_0(b, at, out, x, k, sums)
    if kind == _Q4_K:
        return _q4_or_q5_k(False, b, at, out, x, k, sums)
    if kind == _Q5_K:
        return _q4_or_q5_k(True, b, at, out, x, k, sums)
    if kind == _Q6_K:
        return _q6_k(b, at, out, x, k, sums)
    return _iq4_xs(b, at, out, x, k, sums)


@jit(borrows=True)
def decode(weight, row, start, columns, out):
    """Columns ``start ...`` of the rows from ``row`` on, for :class:`CPUKernels`."""
    blocks, kind, size, nbytes = weight
    b, whole, stop = blocks.reshape(blocks.size), _whole(), start + columns
    for r in range(len(out)):
        for block in range(start // size, (stop + size - 1) // size):
            at, first = (row + r) * blocks.shape[1] + block * nbytes, block * size
            if first >= start and first + size <= stop:
                _block(kind, b, at, out, out, r * out.shape[1] + first - start, four_sums())
            else:
                _block(kind, b, at, whole, whole, 0, four_sums())
                for k in range(max(first, start), min(first + size, stop)):
                    out[r, k - start] = whole[k - first]


@jit(borrows=True)
def _product_of(kind, b, at, size, nbytes, x):
    sums = four_sums()
    for k in range(0, x.size, size):
        prefetch(b, at + AHEAD)
        sums = _block(kind, b, at, None, x, k, sums)
        at += nbytes
    return sum_of_four(sums)


@jit(borrows=True)
def _product(kind, b, at, size, nbytes, x):
    """Σ Ŵ x over the row that begins at ``b[at]``. A loop for each kind has no branches in it."""
    total = _0
    for number in literal_unroll(_NUMBERS):
        if kind == number:
            total = _product_of(number, b, at, size, nbytes, x)
    return total


@jit(parallel=True)
def matmul_one(weight, threads, x, y):
    """``y = x Ŵᵀ`` for one row: weights are decoded and multiplied in registers."""
    blocks, kind, size, nbytes = weight
    b = blocks.reshape(blocks.size)
    for index in prange(threads):
        begin, stop = share(index, threads, y.shape[1])
        for row in range(begin, stop):
            y[0, row] = _product(kind, b, row * blocks.shape[1], size, nbytes, x[0])


kernels = CPUKernels(decode, operands, lambda _: matmul_one)


@cache  # once for each type
def _say(kind: str) -> None:
    logging.getLogger(__name__).warning(
        "gguf: type %s has no kernel yet: plain torch decodes it, some times slower", kind
    )


def tile(packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    kind = packed.metadata["type"]
    if kind in KINDS:
        return kernels.tile(packed, rows, dtype)
    if kind != "BF16":  # torch converts it as fast
        _say(kind)
    return reference.tile(packed, rows).to(dtype)


def product(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    return kernels.product(x, packed, transpose) if packed.metadata["type"] in KINDS else None
