"""INT8 on a GPU, in Triton: the decode function, and how the core's kernels are started on it.

    moves      8 bits a weight and 32 / G of scales (none to speak of row-wise): 1 byte read a weight; a tile writes
               4 (fp32) or 2 (bf16, fp16) beside it
    computes   one conversion and two products for each weight
    floor      products of few rows: 1 byte a weight at the rate of memory; tiles: 5 or 3 bytes a weight

Values are those of :mod:`modulora_int8.reference`, bit for bit: CB times c, rounded, times the fp32 value of 1 / 127.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modulora_core.kernels.triton.blocks import block, times_group
from modulora_core.kernels.triton.products import few_rows, multiply
from modulora_core.kernels.triton.tiles import write_tile
from modulora_core.packed import PackedWeight
from modulora_int8 import reference

_INVERSE = tl.constexpr(reference.INVERSE)


@triton.jit
def decode(  # type: ignore[no-untyped-def]
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
) -> Any:  # fmt: skip
    """A block of Ŵ: :func:`modulora_core.kernels.triton.blocks` has the contract.

    OPTIONS is the group size G, or 0 row-wise. One scale is loaded for a group if G is a power of two, and for each weight if it isn't.
    """
    codes, scales = weight
    at, inside = block(row, col, out_features, in_features, BLOCK_OUT, BLOCK_IN)
    CB = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    if OPTIONS == 0:
        c, inside = block(row, 0, out_features, 1, BLOCK_OUT, 1)
        scaled = CB * tl.load(scales + c, mask=inside, other=0.0)
    elif OPTIONS & (OPTIONS - 1) == 0:
        G: tl.constexpr = min(OPTIONS, BLOCK_IN)
        groups = tl.cdiv(in_features, OPTIONS)
        c, inside = block(row, col // OPTIONS, out_features, groups, BLOCK_OUT, BLOCK_IN // G)
        scaled = times_group(CB, tl.load(scales + c, mask=inside, other=0.0))
    else:
        rows = (row + tl.arange(0, BLOCK_OUT)[:, None]).to(tl.int64)
        group = (col + tl.arange(0, BLOCK_IN)[None, :]) // OPTIONS
        c = rows * tl.cdiv(in_features, OPTIONS) + group
        scaled = CB * tl.load(scales + c, mask=inside, other=0.0)
    return scaled * _INVERSE


def dequantize(packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows ``[start, stop)`` of Ŵ: ``[stop - start, in]`` in fp32, fp16 or bf16."""
    tile = torch.empty(rows[1] - rows[0], packed.shape[1], dtype=dtype, device=packed.device)
    write_tile(decode, _weight(packed), tile, rows, packed.shape, _options(packed))
    return tile


def matmul(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    """``x Ŵᵀ`` for ``x: [..., in]``, or ``x Ŵ`` for ``x: [..., out]``; None where tiles are the way: for many rows, and in fp64."""
    few = few_rows(x, packed.shape[0 if transpose else 1])
    if few is None:
        return None
    y = multiply(decode, _weight(packed), few, packed.shape, _options(packed), transpose=transpose)
    return y.view(*x.shape[:-1], y.shape[1])


def _options(packed: PackedWeight) -> int:
    return packed.metadata["group_size"] or 0


def _weight(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """What :func:`decode` takes apart."""
    return packed.tensors["codes"], packed.tensors["scales"]
