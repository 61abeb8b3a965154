"""E8 codes on a GPU: what tiles and few-row products of :mod:`modulora_core.kernels` decode with.

    moves      2, 3 or 4 bits a weight, and once a program a table of 1 KiB (2 KiB at 3 bits), which stays in the L1 cache
    computes   13 integer operations and one look-up for eight weights, then three operations a weight and the product; with a residual
               twice that. Compiled for sm_86 a product with one row is 7, 13 and 15 instructions a weight at 2, 3 and 4 bits
    floor      the codes' bytes at the rate of memory (few rows), or the tile's (tiles): 4096 · 4096 weights of 2 bits are 4.2 MB, 4.2 µs at
               1 TB/s. At 128 instructions a cycle and 2.5 GHz on 128 processors decoding for one row takes 3.0 µs; where there are fewer of
               them for each byte a second, decoding is the bound

A point of E8P12 is |v| with signs, ± 1/4: twelve values for a coordinate, −11/4, −9/4 … 11/4. So w = 2 v + 15/2 is a whole number
from 2 to 13, and a point is one word of eight such nibbles. The signs enter by one exclusive or, because a change of a sign turns over
bits 1 to 3 of w, and a change of the side bit 0:

    v = k + 1/2 + 1/4   →  w = 2 (4 + k) + 1
    v = −k − 1/2 + 1/4  →  w = 2 (3 − k) + 1        4 + k and 3 − k are each other's complement in three bits
    − 1/4, not + 1/4    →  w is even

E8₁ has coordinates −2, −3/2 … 2, and w = 2 v + 4. A nibble becomes a number without a conversion: put into the mantissa of a large power
of two it is one, after that power is taken away. All that is exact.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modulora_core.kernels.triton.blocks import interleaved
from modulora_core.kernels.triton.products import few_rows, multiply
from modulora_core.kernels.triton.tiles import write_tile
from modulora_core.tiles import tiled_matmul
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.codebooks import BLOCK

ALIGNED = 64
"""Blocks of C begin at multiples of so many columns: eight codes, 16 bytes of them."""

FP16_ROOM = 8
"""In fp16 rows are divided by so many times their largest: then sums over 137 000 columns of C, none above 3.8, are below 65504."""

E8P_OFFSET = tl.constexpr(3.75)
E81_OFFSET = tl.constexpr(2.0)
STEP_3 = tl.constexpr(float(codebooks.residual_step(3)))
STEP_4 = tl.constexpr(float(codebooks.residual_step(4)))


def words() -> Tensor:
    """int32 ``[512]``: a word of nibbles for each vector of E8P12, all signs + and the shift + 1/4, then for each point of E8₁."""
    first = torch.arange(256) << 8
    vectors = 2 * codebooks.e8p_points(first) + 7.5  # signs 0: none, and + 1/4
    points = 2 * codebooks.e81() + 4
    nibbles = torch.cat([vectors, points]).to(torch.int64)  # [512, 8]
    packed = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)


@lru_cache(maxsize=16)
def _placed(device: torch.device) -> Tensor:
    return words().to(device)


@triton.jit
def _point(table, code) -> Any:  # type: ignore[no-untyped-def]
    """Words of nibbles for E8P12 codes, int32 of any shape, of which the low 16 bits are read."""
    word = tl.load(table + ((code >> 8) & 255))
    s = code & 255
    # bit π(i) of s to bit 4 i: even coordinates have the low four bits, odd ones the high four, so all move by multiples of 7
    signs = (s | (s << 7) | (s << 14) | (s << 21)) & 0x11111111
    odd = (
        (signs * 0x11111111) << 3
    ) >> 31  # bit 28 of the product is the parity of all nibbles: 0 or −1
    # an odd number of signs: to the other side, and the sign of coordinate 0 changes
    return word ^ (signs * 14) ^ (odd & 0x1111111F)


@triton.jit
def _coordinate(word, I: tl.constexpr, OFFSET: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]  # noqa: E741
    """The number w / 2 − OFFSET of nibble I of the words, fp32."""
    # nibbles 1 to 4 are in the mantissa's low 20 bits where they are, 0 and 5 to 7 by a shift
    at: tl.constexpr = 4 if I == 0 else 4 * I if I < 5 else 4 * I - 12
    moved = word << 4 if I == 0 else word if I < 5 else word >> 12
    # 2^(22 − at) (1 + w 2^at / 2²³) = 2^(22 − at) + w / 2, of which fp32 has the quarters for at > 0
    number = (moved & (15 << at)) | ((149 - at) << 23)
    return number.to(tl.float32, bitcast=True) - (2.0 ** (22 - at) + OFFSET)


@triton.jit
def _weight(word, left, I: tl.constexpr, BITS: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]  # noqa: E741
    """Coordinate I of C: with what is left over multiplied, rounded, and added, rounded."""
    v = _coordinate(word, I, E8P_OFFSET)
    if BITS == 3:
        v = v + _coordinate(left, I, E81_OFFSET) * STEP_3
    elif BITS == 4:
        v = v + _coordinate(left, I, E8P_OFFSET) * STEP_4
    return v


@triton.jit
def decode(  # type: ignore[no-untyped-def]
    weight, row, col, out_features, in_features,  # noqa: ARG001 - blocks are whole where columns aren't
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
) -> Any:  # fmt: skip
    """A block of C, as :mod:`modulora_core.kernels.triton.blocks` has it; ``col`` is a multiple of :data:`ALIGNED`.

    ``weight`` is codes, residual (codes once more where there is none), :func:`words`, and a row's number of blocks over ALIGN; OPTIONS are
    bits and ALIGN. Outside of the weight are finite numbers, not always 0: products multiply them by 0, and tiles don't store them.
    """
    codes, residual, table, units = weight
    BITS: tl.constexpr = OPTIONS[0]
    ALIGN: tl.constexpr = OPTIONS[1]
    STEP: tl.constexpr = 8 if BLOCK_IN >= 64 else BLOCK_IN // 8  # of blocks of columns, in codes
    blocks = units * ALIGN
    rows = (row + tl.arange(0, BLOCK_OUT))[:, None]
    across = (tl.multiple_of(col // 8, STEP) + tl.arange(0, BLOCK_IN // 8))[None, :]
    inside = (rows < out_features) & (across < blocks)
    at = rows.to(tl.int64) * blocks + across
    word = _point(table, tl.load(codes + at, mask=inside, other=0).to(tl.int32))
    left = word
    if BITS == 3:
        left = tl.load(table + 256 + tl.load(residual + at, mask=inside, other=0).to(tl.int32))
    elif BITS == 4:
        left = _point(table, tl.load(residual + at, mask=inside, other=0).to(tl.int32))
    even = interleaved(
        interleaved(_weight(word, left, 0, BITS), _weight(word, left, 4, BITS)),
        interleaved(_weight(word, left, 2, BITS), _weight(word, left, 6, BITS)),
    )
    odd = interleaved(
        interleaved(_weight(word, left, 1, BITS), _weight(word, left, 5, BITS)),
        interleaved(_weight(word, left, 3, BITS), _weight(word, left, 7, BITS)),
    )
    return interleaved(even, odd)


def _operands(
    codes: Tensor, residual: Tensor, bits: int
) -> tuple[tuple[Tensor | int, ...], tuple[int, int]]:
    """``weight`` and OPTIONS of :func:`decode`."""
    # Triton knows of a number whether 16 divides it, and no more: rows begin at multiples of this many codes
    align = math.gcd(codes.shape[1], BLOCK)
    return (codes, residual, _placed(codes.device), codes.shape[1] // align), (bits, align)


def dequantize(
    codes: Tensor, residual: Tensor, bits: int, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """A part of C: the bits of :func:`modulora_quip_sharp_e8.codebooks.decode`, rounded once.

    Args:
        codes: int16 ``[whole, blocks]``, contiguous, as ``residual`` is.
        residual: as :func:`~modulora_quip_sharp_e8.codebooks.decode` has it; at 2 bits ``codes`` once more.
        rows, columns: ``(start, stop)`` of each.
        dtype: fp32, fp16 or bf16.

    Returns:
        ``[rows, columns]``.
    """
    weight, options = _operands(codes, residual, bits)
    out = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype, device=codes.device)
    write_tile(
        decode, weight, out, rows, (len(codes), columns[1]), options, columns=columns, align=ALIGNED
    )
    return out


def product(
    x: Tensor,
    dtype: torch.dtype,
    codes: Tensor,
    residual: Tensor,
    bits: int,
    columns: int,
    transpose: bool,
) -> Tensor:
    """``x Cᵀ``, or ``x C`` where ``transpose``.

    Args:
        x: fp32 ``[..., columns]``, or ``[..., whole]`` where ``transpose``: inputs that are rotated.
        dtype: of these inputs before they were rotated: where it is a short one, x and C are rounded to it for the tensor cores, as
            they are for every other quantizer. For one row of x they aren't, as that takes none.
        codes, residual, bits: as :func:`dequantize` has them.
        columns: of C, at most ``8 · blocks``.

    Returns:
        fp32 ``[..., whole]``, or ``[..., columns]`` where ``transpose``.
    """
    shape = len(codes), columns
    given, wanted = shape if transpose else shape[::-1]
    if x.numel() == given:
        narrow, unit = x, None
    else:
        narrow, unit = _narrowed(x, dtype)
    few = few_rows(narrow, given)
    if few is not None:
        weight, options = _operands(codes, residual, bits)
        y = multiply(decode, weight, few, shape, options, transpose=transpose)
        y = y.reshape(*x.shape[:-1], wanted)
    else:

        def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
            return dequantize(codes, residual, bits, (start, stop), (0, columns), dtype)

        y = tiled_matmul(narrow, tile, shape, transpose)
    return y.to(torch.float32) if unit is None else y.to(torch.float32) * unit


def _narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``x`` in ``dtype``, and what its rows were divided by: in fp16 neither they nor their products may exceed 65504."""
    if dtype != torch.float16:
        return x.to(dtype), None
    unit = FP16_ROOM * x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / unit).to(dtype), unit
