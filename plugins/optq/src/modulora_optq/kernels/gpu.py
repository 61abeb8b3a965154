"""OPTQ on a GPU, in Triton: decode a block of Ŵ with the reference's bits.

    moves      b bits of codes a weight, and for each group of G weights 16 bits of scale and,
               unless symmetric, b bits of zero: b + (16 + b) / G bits, 4.31 for b = 4 and G = 64.
               A tile also writes 4 (fp32) or 2 bytes (bf16, fp16)
    computes   a shift, a mask, an "or", a subtraction and a product a weight; at 3 bits the first
               three twice
    floor      few-row products: these bytes at the rate of memory, so that a GPU of B bytes/s
               decodes 8 B / 4.31 = 1.9 B weights/s of 4 bits; tiles: 4.54 or 2.54 bytes a weight

A byte holds codes of columns that are far apart (:mod:`modulora_optq.packing`): one column of each
*part* of the row. A row has 8 / w parts for the w bits of the narrowest plane. A thread decodes 16
bytes to 16 neighbours in each part, and multiplies or writes them as whole vectors. Parts take
turns: the bytes come from memory for the first part, and from a cache for the others.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl
from modulora_kernels.triton import GPUKernels, spread
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_optq import packing
from modulora_optq.options import Options

LONGEST_RUN = 16
"""The most columns that share one load of a scale and a zero: the bytes of one load of codes."""

# 2²³ in fp32, whose last bit is worth 1: a code "or"ed into it makes 2²³ + code, and differences of
# such numbers are exact. A conversion from integers runs at a quarter of this rate or less.
_TWO_23 = tl.constexpr(2.0**23)
_TWO_23_BITS = tl.constexpr(0x4B000000)


class Format(NamedTuple):
    """The constants of a compiled kernel.

    Attributes:
        bits: b.
        parts: a row has so many parts of ⌈in / parts⌉ columns.
        even: whether ``in`` is a multiple of ``parts``.
        symmetric: whether every zero is 2^(b − 1).
        group: columns of a group; 0 if a row is one group.
        aligned: whether each part begins with a group, so that its zeros lie where its codes do.
        run: this many columns, from each multiple of it on, are in one group and one part. It is a
            power of two.
    """

    bits: int
    parts: int
    even: bool
    symmetric: bool
    group: int
    aligned: bool
    run: int


@cache
def _format(in_features: int, **metadata: Any) -> Format:
    options = Options.of(**metadata)
    parts = 8 // min(packing.PLANES[options.bits])
    length = -(-in_features // parts)
    even = length * parts == in_features
    group = options.group(in_features) if options.groups(in_features) > 1 else 0
    aligned = group > 0 and length % group == 0 and (even or options.bits != 3)
    shared = gcd(group, length)
    run = min(shared & -shared, LONGEST_RUN)
    return Format(options.bits, parts, even, options.symmetric, group, aligned, run)


def form(packed: PackedWeight) -> Format:
    return _format(packed.shape[1], **packed.metadata)


def operands(packed: PackedWeight) -> tuple[Tensor | int, ...]:
    """The ``weight`` of :func:`decode` but for the part.

    Lengths are arguments, so that Triton sees which of them are multiples of 16.
    """
    codes, scales = packed.tensors["codes"], packed.tensors["scales"]
    zeros = packed.tensors.get("zeros", codes)
    length = -(-packed.shape[1] // form(packed).parts)
    return codes, scales, zeros, length, codes.shape[1], scales.shape[1], zeros.shape[1]


@triton.jit
def plane(
    data, start, part, i, length, n, inside,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
) -> Any:  # fmt: skip
    """WIDTH bits, int32, of codes ``part · length + i`` of rows of n; their plane is at ``start``.

    EVEN: a part of the plane consists of FOLD parts of the row, so that nothing is divided.
    """
    if EVEN:
        FOLD: tl.constexpr = PARTS * WIDTH // 8
        byte = part % FOLD * length + i
        place = part // FOLD
    else:
        code = part * length + i
        place = code // tl.cdiv(n * WIDTH, 8)
        byte = code - place * tl.cdiv(n * WIDTH, 8)
    b = tl.load(data + (start + byte), mask=inside, other=0).to(tl.int32)
    return (b >> (WIDTH * place)) & ((1 << WIDTH) - 1)


@triton.jit
def codes_at(
    data, start, part, i, length, n, inside,
    BITS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
) -> Any:  # fmt: skip
    """2²³ + the codes, fp32; arguments as in :func:`plane`, with rows that begin at ``start``."""
    if BITS == 3:
        low = plane(data, start, part, i, length, n, inside, 2, PARTS, EVEN)
        start += 2 * length if EVEN else tl.cdiv(2 * n, 8)
        code = low | (plane(data, start, part, i, length, n, inside, 1, PARTS, EVEN) << 2)
    else:
        code = plane(data, start, part, i, length, n, inside, BITS, PARTS, EVEN)
    return (code | _TWO_23_BITS).to(tl.float32, bitcast=True)


@triton.jit
def held(
    row, part, columns, length, out_features, in_features,
    BLOCK_OUT: tl.constexpr, EVEN: tl.constexpr,
) -> Any:  # fmt: skip
    """Whether ``columns``, ``[1, n]``, of a part are in the weight: ``[BLOCK_OUT, n]``."""
    inside = (row + tl.arange(0, BLOCK_OUT)[:, None] < out_features) & (columns < length)
    return inside if EVEN else inside & (part * length + columns < in_features)


@triton.jit
def decode(
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
) -> Any:  # fmt: skip
    """Columns ``col ...`` of a part, as :mod:`modulora_kernels.triton.blocks` asks.

    OPTIONS is a :class:`Format`. The value is fp32(q − z) times fp32(s), rounded once.
    """
    BITS: tl.constexpr = OPTIONS[0]
    PARTS: tl.constexpr = OPTIONS[1]
    EVEN: tl.constexpr = OPTIONS[2]
    GROUP: tl.constexpr = OPTIONS[4]
    ALIGNED: tl.constexpr = OPTIONS[5]
    RUN: tl.constexpr = min(OPTIONS[6], BLOCK_IN) if GROUP else BLOCK_IN
    codes, scales, zeros, length, row_bytes, groups, zero_bytes = weight[:7]
    part = weight[7] if PARTS > 1 else 0
    rows = (row + tl.arange(0, BLOCK_OUT)[:, None]).to(tl.int64)
    col = tl.cast(col, tl.int32)  # within a row; only the begin of a row needs 64 bits
    columns = col + tl.arange(0, BLOCK_IN)[None, :]
    inside = held(row, part, columns, length, out_features, in_features, BLOCK_OUT, EVEN)
    q = codes_at(
        codes, rows * row_bytes, part, columns, length, in_features, inside,
        BITS, PARTS, EVEN or BITS != 3,
    )  # fmt: skip

    runs = col + RUN * tl.arange(0, BLOCK_IN // RUN)[None, :]
    known = held(row, part, runs, length, out_features, in_features, BLOCK_OUT, EVEN)
    if ALIGNED:
        group, part_groups, of_part = runs // GROUP, length // GROUP, part
    else:  # counted from the first of the row
        group, part_groups, of_part = (part * length + runs) // GROUP if GROUP else runs * 0, 0, 0
    group_of_row = of_part * part_groups + group
    s = tl.load(scales + (rows * groups + group_of_row), mask=known, other=0.0).to(tl.float32)
    if OPTIONS[3]:
        steps = q - (_TWO_23 + (1 << (BITS - 1)))
    else:
        z = codes_at(
            zeros, rows * zero_bytes, of_part, group, part_groups, groups, known,
            BITS, PARTS, ALIGNED,
        )  # fmt: skip
        steps = q - spread(z, RUN)
    w = steps * spread(s, RUN)
    # otherwise a run may begin inside and end outside
    return w if EVEN and GROUP else tl.where(inside, w, 0.0)


kernels = GPUKernels(decode, operands, form, lambda packed: form(packed).parts)
tile, product = kernels.tile, kernels.product
