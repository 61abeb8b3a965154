"""OPTQ on a GPU, in Triton: the decode function, and how the core's kernels are started on it.

    moves      b bits of codes a weight, and for each group of G of them 16 bits of scale and, unless symmetric, b of zero:
               b + (16 + b) / G bits, 4.31 for b = 4 and G = 64. A tile writes 4 (fp32) or 2 bytes (bf16, fp16) beside it
    computes   a shift, a mask, an "or", a subtraction and a product for each weight; of 3 bits the first three twice
    floor      products of few rows: the bytes above at the rate of memory, so that a GPU of B bytes/s decodes
               8 B / 4.31 = 1.9 B weights/s of 4 bits; tiles: 4.54 or 2.54 bytes a weight of 4 bits

Bits lie as :mod:`modulora_optq.packing` arranges them: a byte holds codes of columns that are far apart, one of each *part* of the row,
which is cut into 8 / w parts for the w bits of the narrowest plane. What a thread decodes from 16 bytes are 16 neighbours in each part,
which it multiplies or writes as whole vectors. The parts are taken in turn (:mod:`modulora_core.kernels.triton.blocks`): the bytes
come from memory for the first of them, and from a cache for the others.

Values are those of :mod:`modulora_optq.reference`, bit for bit: fp32(q − z) times fp32(s), rounded once.

Columns that are stored in another order than the weight's are put back by torch, over the finished tile, which so is written twice and read
once: a kernel that read or wrote single columns here and there would move 32 bytes for each value of 2 or 4. Products don't need
it (``quantizer.py``), and the default options permute none.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modulora_core.kernels.triton.products import DTYPES, few_rows, multiply
from modulora_core.kernels.triton.tiles import write_tile
from modulora_optq import packing

__all__ = ["Weight", "dequantize", "few_rows", "matmul"]

LONGEST_RUN = 16
"""Columns for which a scale and a zero are loaded at most: those of the bytes of one load, so that no thread needs the scale of another."""

# 2²³ in fp32, where the last bit is worth 1: a code "or"ed into it makes 2²³ + code, and differences of such numbers are
# exact. Conversions from integers, which this replaces, run at a quarter of the rate of other operations or less.
_TWO_23 = tl.constexpr(2.0**23)
_TWO_23_BITS = tl.constexpr(0x4B000000)


class Format(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        bits: b.
        parts: into how many parts of ⌈in / parts⌉ columns the bytes of a row make it fall.
        even: whether ``in`` is a multiple of ``parts``.
        symmetric: whether every zero is 2^(b − 1).
        group: columns of a group; 0 where a row is one group.
        aligned: whether each part begins with a group, and so has its zeros where it has its codes.
        run: so many columns from a multiple of it on are in one group and in one part: a power of two.
    """

    bits: int
    parts: int
    even: bool
    symmetric: bool
    group: int
    aligned: bool
    run: int


class Weight(NamedTuple):
    """Packed tensors as the kernels take them.

    Attributes:
        shape: ``(out, in)``.
        codes, scales, zeros: those of :mod:`modulora_optq.quantizer`, contiguous; no zeros of a symmetric weight.
        bits: b.
        group: columns of a group.
    """

    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int

    @property
    def format(self) -> Format:
        return _format(self.shape[1], self.bits, self.group, self.zeros is None)

    @property
    def operands(self) -> tuple[Tensor | int, ...]:
        """What :func:`decode` takes apart, but for the part. Lengths are numbers, so that Triton sees which are multiples of 16."""
        in_features, groups = self.shape[1], self.scales.shape[1]
        length = -(-in_features // self.format.parts)
        zeros = self.codes if self.zeros is None else self.zeros
        row_bytes, zero_bytes = (packing.row_bytes(n, self.bits) for n in (in_features, groups))
        return self.codes, self.scales, zeros, length, row_bytes, groups, zero_bytes


@cache
def _format(in_features: int, bits: int, group: int, symmetric: bool) -> Format:
    parts = 8 // min(packing.PLANES[bits])
    length = -(-in_features // parts)
    even = length * parts == in_features
    if group >= in_features:
        group = 0
    aligned = group > 0 and length % group == 0 and (even or bits != 3)
    shared = gcd(group, length)
    return Format(bits, parts, even, symmetric, group, aligned, min(shared & -shared, LONGEST_RUN))


@triton.jit
def plane(  # type: ignore[no-untyped-def]
    data, start, part, i, length, n, inside, WIDTH: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr
) -> Any:  # fmt: skip
    """WIDTH bits, int32, of the codes ``part · length + i`` of rows of n, where a row's plane begins at ``start``.

    EVEN: the parts of the row are parts of the plane, FOLD to one, so that nothing is divided.
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
def codes_at(  # type: ignore[no-untyped-def]
    data, start, part, i, length, n, inside, BITS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr
) -> Any:  # fmt: skip
    """2²³ + the codes, fp32; arguments as in :func:`plane`, where a row begins at ``start``."""
    if BITS == 3:
        low = plane(data, start, part, i, length, n, inside, 2, PARTS, EVEN)
        start += 2 * length if EVEN else tl.cdiv(2 * n, 8)
        code = low | (plane(data, start, part, i, length, n, inside, 1, PARTS, EVEN) << 2)
    else:
        code = plane(data, start, part, i, length, n, inside, BITS, PARTS, EVEN)
    return (code | _TWO_23_BITS).to(tl.float32, bitcast=True)


@triton.jit
def held(  # type: ignore[no-untyped-def]
    row, part, columns, length, out_features, in_features, BLOCK_OUT: tl.constexpr, EVEN: tl.constexpr
) -> Any:  # fmt: skip
    """Which ``columns`` ``[1, n]`` of a part, in which rows, the weight has: ``[BLOCK_OUT, n]``."""
    inside = (row + tl.arange(0, BLOCK_OUT)[:, None] < out_features) & (columns < length)
    return inside if EVEN else inside & (part * length + columns < in_features)


@triton.jit
def spread(values, RUN: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """``[rows, n]`` to ``[rows, n · RUN]``: each value RUN times."""
    rows: tl.constexpr = values.shape[0]
    n: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], rows, n, RUN), rows, n * RUN)


@triton.jit
def decode(  # type: ignore[no-untyped-def]
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
) -> Any:  # fmt: skip
    """Columns ``col ...`` of a part: :mod:`modulora_core.kernels.triton.blocks` has the contract. OPTIONS is a :class:`Format`."""
    BITS: tl.constexpr = OPTIONS[0]
    PARTS: tl.constexpr = OPTIONS[1]
    EVEN: tl.constexpr = OPTIONS[2]
    GROUP: tl.constexpr = OPTIONS[4]
    ALIGNED: tl.constexpr = OPTIONS[5]
    RUN: tl.constexpr = min(OPTIONS[6], BLOCK_IN) if GROUP else BLOCK_IN
    codes, scales, zeros, length, row_bytes, groups, zero_bytes = weight[:7]
    part = weight[7] if PARTS > 1 else 0
    rows = (row + tl.arange(0, BLOCK_OUT)[:, None]).to(tl.int64)
    col = tl.cast(col, tl.int32)  # of a row; only a row's begin is far away
    columns = col + tl.arange(0, BLOCK_IN)[None, :]
    inside = held(row, part, columns, length, out_features, in_features, BLOCK_OUT, EVEN)
    rows_codes = rows * row_bytes
    q = codes_at(
        codes,
        rows_codes,
        part,
        columns,
        length,
        in_features,
        inside,
        BITS,
        PARTS,
        EVEN or BITS != 3,
    )

    runs = col + RUN * tl.arange(0, BLOCK_IN // RUN)[None, :]
    known = held(row, part, runs, length, out_features, in_features, BLOCK_OUT, EVEN)
    if ALIGNED:
        group, part_groups, of_part = runs // GROUP, length // GROUP, part
    else:  # counted from the row's first
        group, part_groups, of_part = (part * length + runs) // GROUP if GROUP else runs * 0, 0, 0
    group_of_row = of_part * part_groups + group
    s = tl.load(scales + (rows * groups + group_of_row), mask=known, other=0.0).to(tl.float32)
    if OPTIONS[3]:
        steps = q - (_TWO_23 + (1 << (BITS - 1)))
    else:
        rows_zeros = rows * zero_bytes
        z = codes_at(
            zeros, rows_zeros, of_part, group, part_groups, groups, known, BITS, PARTS, ALIGNED
        )
        steps = q - spread(z, RUN)
    w = steps * spread(s, RUN)
    return (
        w if EVEN and GROUP else tl.where(inside, w, 0.0)
    )  # else a run may begin inside and end outside


def dequantize(weight: Weight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows ``[start, stop)`` of Ŵ with the columns as they are stored: ``[stop - start, in]`` in any float dtype."""
    written = dtype if dtype in DTYPES else torch.float32
    tile = torch.empty(
        rows[1] - rows[0], weight.shape[1], dtype=written, device=weight.codes.device
    )
    form = weight.format
    write_tile(decode, weight.operands, tile, rows, weight.shape, form, parts=form.parts)
    return tile.to(dtype)


def matmul(x: Tensor, weight: Weight, transpose: bool) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ``, with the columns as they are stored: :func:`modulora_core.kernels.triton.products.multiply`."""
    form = weight.format
    return multiply(
        decode, weight.operands, x, weight.shape, form, transpose=transpose, parts=form.parts
    )
