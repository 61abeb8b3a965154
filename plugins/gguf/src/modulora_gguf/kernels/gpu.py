"""Common types on a GPU, in Triton: the values of the reference, bit for bit.

    moves      the bytes of the blocks, 4.25 to 8.5 bits a weight; a tile writes 4 (fp32) or 2 bytes
    computes   a shift, a mask and one or two products a weight; scales once for 16 or 32 weights
    floor      those bytes at the rate of memory; a byte of two codes is loaded twice, from L1

Other types are decoded by :mod:`modulora_gguf.reference` on the GPU. Blocks have 18 to 210 bytes,
so that loads are of single bytes. Symbols are the reference's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from modulora_kernels.triton import GPUKernels, spread
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_gguf import codebooks, reference

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
"""The types with kernels."""


@triton.jit
def byte(data, at, inside) -> Any:
    return tl.load(data + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def half(words, at, inside) -> Any:
    """The fp16 number at an even byte, as fp32; NaN and infinities, of damage, as 0."""
    number = tl.load(words + (at >> 1), mask=inside, other=0.0).to(tl.float32)
    return tl.where(tl.abs(number) < 65536.0, number, 0.0)


@triton.jit
def scales(
    data, words, start, part, inside, KIND: tl.constexpr
) -> Any:  # fmt: skip
    """The step and the minimum of each part of 16 or 32 weights, fp32; ``start`` is its block."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        a = byte(data, start + 4 + part % 4, inside)
        b = byte(data, start + 8 + part % 4, inside)
        high = byte(data, start + 12 + part % 4, inside)
        sc = tl.where(part < 4, a & 63, (high & 15) | (a >> 2 & 48))
        m = tl.where(part < 4, b & 63, (high >> 4) | (b >> 2 & 48))
        step = half(words, start, inside) * sc.to(tl.float32)
        minimum = half(words, start + 2, inside) * m.to(tl.float32)
    elif KIND == "Q6_K":
        sc = (byte(data, start + 192 + part, inside) ^ 128) - 128  # signed
        step = half(words, start + 208, inside) * sc.to(tl.float32)
        minimum = step
    elif KIND == "IQ4_XS":
        low = byte(data, start + 4 + part // 2, inside) >> 4 * (part % 2) & 15
        high = byte(data, start + 2 + part // 4, inside) >> 2 * (part % 4) & 3
        step = half(words, start, inside) * ((low | high << 4) - 32).to(tl.float32)
        minimum = step
    else:
        step = half(words, start, inside)
        minimum = half(words, start + 2, inside) if KIND == "Q4_1" else step
    return step, minimum


@triton.jit
def codes(data, start, k, inside, KIND: tl.constexpr) -> Any:
    """The code of weight k of each block, int32, shifted to its range."""
    if KIND == "Q8_0":
        q = (byte(data, start + 2 + k, inside) ^ 128) - 128
    elif KIND == "Q6_K":
        low = byte(data, start + 64 * (k // 128) + k % 64, inside) >> 4 * (k // 64 % 2) & 15
        high = byte(data, start + 128 + 32 * (k // 128) + k % 32, inside) >> 2 * (k // 32 % 4) & 3
        q = (low | high << 4) - 32
    elif KIND == "Q4_K" or KIND == "Q5_K":
        AT: tl.constexpr = 16 if KIND == "Q4_K" else 48
        q = byte(data, start + AT + 32 * (k // 64) + k % 32, inside) >> 4 * (k // 32 % 2) & 15
        if KIND == "Q5_K":
            q = q | (byte(data, start + 16 + k % 32, inside) >> k // 32 & 1) << 4
    else:
        FIRST: tl.constexpr = (
            2 if KIND == "Q4_0" else 4 if KIND == "Q4_1" else 6 if KIND == "Q5_0" else 8
        )
        q = byte(data, start + FIRST + 16 * (k // 32) + k % 16, inside) >> 4 * (k // 16 % 2) & 15
        if KIND == "Q5_0":
            q = (q | (byte(data, start + 2 + k // 8, inside) >> k % 8 & 1) << 4) - 16
        elif KIND == "Q4_0":
            q = q - 8
    return q


@triton.jit
def decode(
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
) -> Any:  # fmt: skip
    """A block of Ŵ: :func:`modulora_kernels.triton.blocks` has the contract.

    OPTIONS is the type, the weights and bytes of its blocks, and the weights of a scale.
    """
    KIND: tl.constexpr = OPTIONS[0]
    SIZE: tl.constexpr = OPTIONS[1]
    NBYTES: tl.constexpr = OPTIONS[2]
    PART: tl.constexpr = OPTIONS[3]
    data, words, levels, row_bytes = weight
    rows = (row + tl.arange(0, BLOCK_OUT)[:, None]).to(tl.int64)
    col = tl.cast(col, tl.int32)  # within a row; only the begin of a row needs 64 bits
    column = col + tl.arange(0, BLOCK_IN)[None, :]
    inside = (rows < out_features) & (column < in_features)
    q = codes(data, rows * row_bytes + column // SIZE * NBYTES, column % SIZE, inside, KIND)
    part = col // PART + tl.arange(0, BLOCK_IN // PART)[None, :]
    known = (rows < out_features) & (part * PART < in_features)
    start = rows * row_bytes + part * PART // SIZE * NBYTES
    step, minimum = scales(data, words, start, part % (SIZE // PART), known, KIND)
    values = tl.load(levels + q) if KIND == "IQ4_XS" else q.to(tl.float32)
    w = values * spread(step, PART)
    if KIND == "Q4_1":
        w = w + spread(minimum, PART)
    elif KIND == "Q4_K" or KIND == "Q5_K":
        w = w - spread(minimum, PART)
    return w


def operands(packed: PackedWeight) -> tuple[Tensor | int, ...]:
    """The ``weight`` of :func:`decode`: the blocks as bytes and as fp16, and IQ4's levels."""
    blocks = packed.tensors["blocks"]
    return blocks, blocks.view(torch.float16), _levels(packed.device), blocks.shape[1]


@cache
def _levels(device: torch.device) -> Tensor:
    return codebooks.lookup("IQ4_NL", torch.arange(16, device=device))


def options(packed: PackedWeight) -> tuple[str, int, int, int]:
    """The ``OPTIONS`` of :func:`decode`."""
    kind = packed.metadata["type"]
    return kind, *reference.block_of(kind), 16 if kind == "Q6_K" else 32


kernels = GPUKernels(decode, operands, options, widest=256)


def tile(packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    kind = packed.metadata["type"]
    if kind in KINDS:
        return kernels.tile(packed, rows, dtype)
    return reference.tile(packed, rows).to(dtype)


def product(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    return kernels.product(x, packed, transpose) if packed.metadata["type"] in KINDS else None
