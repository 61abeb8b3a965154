"""QTIP's kernels on a GPU, in Triton: tiles of C and products with C.

moves      K bits a weight, from memory once
computes   a shift, a mask, a product and the code function a weight: 5 operations for bytes
floor      the bytes of the walks (few rows) or of the tile (tiles) at the rate of memory

A thread decodes the 32 weights of a *run*, four lanes of eight (:mod:`modulora_qtip.trellis`), and
holds the run's K words and the word before them in registers. So every shift is a constant. At
k + ½ bits every second run begins in the middle of a word: its words are then put together from
halves of neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from modulora_kernels.triton import GPUKernels
from modulora_kernels.triton.blocks import INTERPRETED
from torch import Tensor
from triton.language.target_info import is_cuda

from modulora_core.packed import PackedWeight
from modulora_qtip import codes
from modulora_qtip.trellis import TILE

DIVISOR = {"bytes": 7, "halves": 0, "fused": 0}
"""By kind of a code: products are with C divided by so many powers of two, and below 4 then."""

KINDS = {"bytes": 0, "halves": 1, "fused": 2}

MASK, FLIP = tl.constexpr(codes.MASK), tl.constexpr(codes.FLIP)
FACTOR, OFFSET = tl.constexpr(codes.FACTOR), tl.constexpr(codes.OFFSET)


@triton.jit
def _byte_sum(x, start: tl.constexpr) -> Any:
    """``start``, whose low ten bits are 0, plus the four bytes of x: uint32."""
    if not INTERPRETED and is_cuda():
        # one instruction for six: a product of one row then takes half the time
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, $2;", "=r,r,r", [x, start],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    pairs = (x & 0xFF00FF) + ((x >> 8) & 0xFF00FF)
    return ((pairs + (pairs >> 16)) & 0x3FF) | start


@triton.jit
def _value(
    state, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr, KIND: tl.constexpr,
    DIVISOR: tl.constexpr,
) -> Any:  # fmt: skip
    """The values of states, uint32, divided by 2^DIVISOR."""
    x = state * MULTIPLIER + ADDEND
    if KIND == 1:
        x = (x & MASK) ^ FLIP
        low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        return (low + high).to(tl.float32)
    # one unit of the code is the last bit of 2^(23 - DIVISOR)
    number = _byte_sum(x, (150 - DIVISOR) << 23).to(tl.float32, bitcast=True)
    if KIND == 0:
        return number - (2.0**23 + 510) / 2.0**DIVISOR
    # a sum of fp16 products is exact in fp32, so fp16 rounds once
    return ((number - (2.0**23 - 1024)) * FACTOR + OFFSET).to(tl.float16).to(tl.float32)


@triton.jit
def _state(words, END: tl.constexpr) -> Any:
    """The 32 bits of runs before bit END, uint32. ``words`` begin one word before the runs."""
    N: tl.constexpr = (END - 1) // 32
    both = (words[N].to(tl.uint64) << 32) | words[N + 1].to(tl.uint64)
    return (both >> (32 * N + 32 - END)).to(tl.uint32)


@triton.jit
def _weights(words, N: tl.constexpr, OPTIONS: tl.constexpr) -> Any:
    """Weight N of eight, of each of the four lanes: ``[tiles, runs, 2, 2]``."""
    TWICE: tl.constexpr = OPTIONS[0]
    END: tl.constexpr = (N + 1) * TWICE // 2
    even = tl.join(_state(words, END), _state(words, END + 8 * TWICE))
    odd = tl.join(_state(words, END + 4 * TWICE), _state(words, END + 12 * TWICE))
    state = tl.join(even, odd) & ((1 << OPTIONS[1]) - 1)
    return _value(state, OPTIONS[2], OPTIONS[3], OPTIONS[4], OPTIONS[5])


@triton.jit
def _output(words, FIRST: tl.constexpr, OPTIONS: tl.constexpr) -> Any:
    """The weights of one output: four of each lane, in the order r / 8, r % 2."""
    even = tl.join(_weights(words, FIRST, OPTIONS), _weights(words, FIRST + 2, OPTIONS))
    odd = tl.join(_weights(words, FIRST + 1, OPTIONS), _weights(words, FIRST + 3, OPTIONS))
    return tl.join(even, odd)


@triton.jit
def _moved(held, odd, WORDS: tl.constexpr) -> Any:
    """The words of runs, where those of ``odd`` ones begin in the middle of a word."""
    found = (tl.where(odd, (held[0] << 16) | (held[1] >> 16), held[0]),)
    for k in tl.static_range(1, WORDS):
        word = tl.where(odd, (held[k] << 16) | (held[k + 1] >> 16), held[k])
        found = found + (word,)  # type: ignore[assignment]  # noqa: RUF005
    last = tl.where(odd, held[WORDS] << 16, held[WORDS])
    return found + (last,)  # noqa: RUF005


@triton.jit
def decode(
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
) -> Any:  # fmt: skip
    """A block of C for :class:`modulora_kernels.triton.GPUKernels`; 16 divides row and col.

    ``weight`` is the walks as words, int32, and the number of tiles along the outputs. OPTIONS are
    2 K, L, the multiplier and the addend of the code, its kind, and the divisor's exponent.
    """
    words, across = weight
    TWICE: tl.constexpr = OPTIONS[0]
    WORDS: tl.constexpr = (TWICE + 1) // 2
    OUT: tl.constexpr = BLOCK_OUT // 16
    IN: tl.constexpr = BLOCK_IN // 16
    # a run is outputs c and c + 8 of a tile
    tile = tl.cast(col >> 4, tl.int32) + tl.arange(0, IN)[:, None]
    run = tl.cast(row >> 4, tl.int32) * 8 + tl.arange(0, 8 * OUT)[None, :]
    inside = (tile * 16 < in_features) & (run * 2 < out_features)
    at = tile.to(tl.int64) * across * 8 + run
    # a shift would hide the alignment of whole words
    at = (at * TWICE) >> 1 if TWICE % 2 == 1 else at * (TWICE // 2)
    before = at + tl.where(run % 8 == 0, 4 * TWICE - 1, -1)
    held = (tl.load(words + before, mask=inside, other=0).to(tl.uint32, bitcast=True),)
    for k in tl.static_range(WORDS):
        word = tl.load(words + at + k, mask=inside, other=0).to(tl.uint32, bitcast=True)
        held = held + (word,)  # type: ignore[assignment]  # noqa: RUF005
    if TWICE % 2 == 1:
        held = _moved(held, run % 2 == 1, WORDS)
    w = tl.join(_output(held, 0, OPTIONS), _output(held, 4, OPTIONS))
    # [tile, run, lane / 2, lane % 2, r / 8, r % 2, c / 8]
    w = tl.reshape(w, IN, OUT, 8, 4, 2, 2, 2)
    return tl.reshape(tl.permute(w, 1, 6, 2, 0, 4, 3, 5), BLOCK_OUT, BLOCK_IN)


def operands(C: PackedWeight) -> tuple[Tensor | int, ...]:
    """The ``weight`` of :func:`decode`."""
    walks = C.tensors["trellis"]
    return walks.view(torch.int32), walks.shape[1]


def _options(C: PackedWeight, divisor: int) -> tuple[int, ...]:
    code = codes.CODES[C.metadata["code"]]
    bits, states = C.metadata["bits"], C.metadata["states"]
    return int(2 * bits), states, code.multiplier, code.addend, KINDS[code.kind], divisor


def _divisor(C: PackedWeight) -> int:
    return DIVISOR[codes.CODES[C.metadata["code"]].kind]


def unit_of(C: PackedWeight) -> int:
    """The divisor of C in products."""
    return 1 << _divisor(C)


tile = GPUKernels(decode, operands, lambda C: _options(C, 0), widest=64, strip=TILE).tile
_divided = GPUKernels(decode, operands, lambda C: _options(C, _divisor(C)), widest=64, strip=TILE)


def multiply(x: Tensor, C: PackedWeight, transpose: bool, dtype: torch.dtype) -> Tensor | None:
    """As :meth:`modulora_kernels.triton.GPUKernels.product_of_rotated`."""
    y = _divided.product_of_rotated(x, C, transpose, dtype)
    return None if y is None else y * unit_of(C)


def product_of_one(_x: Tensor, _packed: PackedWeight, _transpose: bool) -> None:
    """None: a GPU rotates by kernels of their own."""
