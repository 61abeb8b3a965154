"""QuIP#'s kernels on a GPU, in Triton: tiles of C and products with C.

    moves      2, 3 or 4 bits a weight, and once a program a table of 1 KiB (2 KiB at 3 bits)
    computes   13 integer operations and one lookup for eight weights, then three operations a
               weight and the product; twice that with a residual
    floor      the bytes of the codes (few rows) or of the tile (tiles) at the rate of memory

A point of E8P12 has signs and ± 1/4: a coordinate v has twelve values, −11/4, −9/4 … 11/4. So
w = 2 v + 15/2 is a whole number from 2 to 13, and a point is one word of eight such nibbles. An
exclusive or brings the signs, because a sign flips bits 1 to 3 of w, and the side flips bit 0::

    v = k + 1/2 + 1/4   →  w = 2 (4 + k) + 1
    v = −k − 1/2 + 1/4  →  w = 2 (3 − k) + 1        4 + k = 7 − (3 − k)
    − 1/4, not + 1/4    →  w is even

E8₁ has coordinates −2, −3/2 … 2, and w = 2 v + 4. The nibble is put into the mantissa of a large
power of two, which is then taken away: that needs no conversion. All of this is exact.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from modulora_kernels.triton import GPUKernels, interleaved
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.codebooks import BLOCK

E8P_OFFSET = tl.constexpr(3.75)
E81_OFFSET = tl.constexpr(2.0)
STEP_3 = tl.constexpr(float(codebooks.residual_step(3)))
STEP_4 = tl.constexpr(float(codebooks.residual_step(4)))


@cache
def words(device: torch.device) -> Tensor:
    """int32 ``[512]`` on ``device``: a word for each vector of E8P12, then for each point of E8₁.

    A vector has no signs and the shift + 1/4.
    """
    vectors = 2 * codebooks.e8p_points(torch.arange(256) << 8) + 7.5
    nibbles = torch.cat([vectors, 2 * codebooks.e81() + 4]).to(torch.int64)  # [512, 8]
    packed = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32).to(device)


@triton.jit
def _point(table, code) -> Any:
    """Words of nibbles for codes of E8P12: the low 16 bits of int32, of any shape."""
    word = tl.load(table + ((code >> 8) & 255))
    s = code & 255
    # even coordinates have the low four bits of s, odd ones the high four: all move by sevens
    signs = (s | (s << 7) | (s << 14) | (s << 21)) & 0x11111111
    odd = ((signs * 0x11111111) << 3) >> 31  # bit 28 is the parity of all nibbles: 0 or −1
    # an odd number of signs: to the other side, and the sign of coordinate 0 changes
    return word ^ (signs * 14) ^ (odd & 0x1111111F)


@triton.jit
def _coordinate(word, C: tl.constexpr, OFFSET: tl.constexpr) -> Any:
    """The number w / 2 − OFFSET of nibble C of the words, fp32."""
    # nibbles 1 to 4 are in the mantissa's low 20 bits already, 0 and 5 to 7 by a shift
    at: tl.constexpr = 4 if C == 0 else 4 * C if C < 5 else 4 * C - 12
    moved = word << 4 if C == 0 else word if C < 5 else word >> 12
    # 2^(22 − at) (1 + w 2^at / 2²³) = 2^(22 − at) + w / 2
    number = (moved & (15 << at)) | ((149 - at) << 23)
    return number.to(tl.float32, bitcast=True) - (2.0 ** (22 - at) + OFFSET)


@triton.jit
def _weight(word, left, C: tl.constexpr, BITS: tl.constexpr) -> Any:
    """Coordinate C of the eight; a residual is multiplied, rounded, and added, rounded."""
    v = _coordinate(word, C, E8P_OFFSET)
    if BITS == 3:
        v = v + _coordinate(left, C, E81_OFFSET) * STEP_3
    elif BITS == 4:
        v = v + _coordinate(left, C, E8P_OFFSET) * STEP_4
    return v


@triton.jit
def decode(
    weight, row, col, out_features, in_features,  # noqa: ARG001 - blocks of codes are whole
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
) -> Any:  # fmt: skip
    """A block of C for :class:`modulora_kernels.triton.GPUKernels`; 8 divides ``col``.

    ``weight`` is codes, residual (codes again if there is none), :func:`words`, and a row's number
    of blocks over ALIGN. OPTIONS are bits and ALIGN. Numbers outside of C are finite, not 0:
    products multiply them by 0, and tiles do not store them.
    """
    codes, residual, table, units = weight
    BITS: tl.constexpr = OPTIONS[0]
    ALIGN: tl.constexpr = OPTIONS[1]
    STEP: tl.constexpr = min(8, BLOCK_IN // 8)
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


def operands(C: PackedWeight) -> tuple[Tensor | int, ...]:
    """The ``weight`` of :func:`decode`."""
    codes = C.tensors["codes"]
    units = codes.shape[1] // _align(C)
    return codes, C.tensors.get("residual", codes), words(C.device), units


def options(C: PackedWeight) -> tuple[int, int]:
    """The ``OPTIONS`` of :func:`decode`."""
    return C.metadata["bits"], _align(C)


def _align(C: PackedWeight) -> int:
    """Rows begin at multiples of so many codes. Triton knows of a number whether 16 divides it."""
    return math.gcd(C.tensors["codes"].shape[1], BLOCK)


_kernels = GPUKernels(decode, operands, options)
tile, multiply = _kernels.tile, _kernels.product_of_rotated


def product_of_one(_x: Tensor, _packed: PackedWeight, _transpose: bool) -> None:
    """None: a GPU rotates by kernels of their own."""
