"""QTIP's kernels on a GPU, in Triton: tiles of C and products with C.

moves      K bits a weight, from memory once; each word again from the L1 cache
computes   two loads, a shift, a product and the code function a weight: 15 operations or so
floor      the bytes of the walks (few rows) or of the tile (tiles) at the rate of memory
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from modulora_kernels.triton import GPUKernels
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_qtip import codes

UNIT = {"bytes": 128, "halves": 1, "fused": 1}
"""By kind of a code: products are with C divided by it, a power of two, and below 4 then."""

KINDS = {"bytes": 0, "halves": 1, "fused": 2}

MASK, FLIP = tl.constexpr(codes.MASK - 2**32), tl.constexpr(codes.FLIP)
FACTOR, OFFSET = tl.constexpr(codes.FACTOR), tl.constexpr(codes.OFFSET)


@triton.jit
def _half(x) -> Any:
    """The low 16 bits as an fp16 number, in fp32."""
    return (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _value(state, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr, KIND: tl.constexpr) -> Any:
    """The values of states, int32."""
    x = state * MULTIPLIER + ADDEND
    if KIND == 1:
        x = (x & MASK) ^ FLIP
        return (_half(x) + _half(x >> 16)).to(tl.float16).to(tl.float32)
    total = (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + ((x >> 24) & 255)
    if KIND == 0:
        return (total - 510).to(tl.float32)
    # a sum of fp16 products is exact in fp32, so fp16 rounds once
    return ((total + 1024).to(tl.float32) * FACTOR + OFFSET).to(tl.float16).to(tl.float32)


@triton.jit
def decode(
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
) -> Any:  # fmt: skip
    """A block of C for :class:`modulora_kernels.triton.GPUKernels`.

    ``weight`` is the walks as words, int32, and the number of tiles along the outputs. OPTIONS are
    K, L, the multiplier and the addend of the code, its kind, and the divisor of C.
    """
    words, across = weight
    K: tl.constexpr = OPTIONS[0]
    L: tl.constexpr = OPTIONS[1]
    o = row + tl.arange(0, BLOCK_OUT)[:, None]
    i = col + tl.arange(0, BLOCK_IN)[None, :]
    inside = (o < out_features) & (i < in_features)
    r = (i & 15).to(tl.int32)
    c = (o & 15).to(tl.int32)
    # weight t of a tile, by trellis.POSITION
    t = (c & 7) * 32 + ((r >> 1) & 3) * 8 + (c >> 3) * 4 + (r >> 3) * 2 + (r & 1)
    last = t * K + (K - 1)  # the last bit of the state
    word = last >> 5
    before = tl.where(word == 0, 8 * K - 1, word - 1)
    tile = ((i >> 4).to(tl.int64) * across + (o >> 4)) * (8 * K)
    high = tl.load(words + tile + before, mask=inside, other=0)
    low = tl.load(words + tile + word, mask=inside, other=0)
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    state = ((both >> (31 - (last & 31)).to(tl.int64)) & ((1 << L) - 1)).to(tl.int32)
    return _value(state, OPTIONS[2], OPTIONS[3], OPTIONS[4]) * (1.0 / OPTIONS[5])


def operands(C: PackedWeight) -> tuple[Tensor | int, ...]:
    """The ``weight`` of :func:`decode`."""
    walks = C.tensors["trellis"]
    return walks.view(torch.int32), walks.shape[1]


def _options(C: PackedWeight, unit: int) -> tuple[int, ...]:
    code = codes.CODES[C.metadata["code"]]
    multiplier = code.multiplier - (code.multiplier >> 31 << 32)
    bits, states = C.metadata["bits"], C.metadata["states"]
    return bits, states, multiplier, code.addend, KINDS[code.kind], unit


def unit_of(C: PackedWeight) -> int:
    """The divisor of C in products."""
    return UNIT[codes.CODES[C.metadata["code"]].kind]


tile = GPUKernels(decode, operands, lambda C: _options(C, 1)).tile
_divided = GPUKernels(decode, operands, lambda C: _options(C, unit_of(C)))


def multiply(x: Tensor, C: PackedWeight, transpose: bool, dtype: torch.dtype) -> Tensor | None:
    """As :meth:`modulora_kernels.triton.GPUKernels.product_of_rotated`."""
    y = _divided.product_of_rotated(x, C, transpose, dtype)
    return None if y is None else y * unit_of(C)


def product_of_one(_x: Tensor, _packed: PackedWeight, _transpose: bool) -> None:
    """None: a GPU rotates by kernels of their own."""
