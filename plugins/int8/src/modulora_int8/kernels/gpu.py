"""INT8 on a GPU, in Triton: the decode function, and how the core's kernels are started on it.

    moves      1 byte a weight, and 4 / G of scales; a tile writes 4 (fp32) or 2 (bf16, fp16) more
    computes   one conversion and two products for each weight
    floor      products of few rows: 1 byte a weight at the rate of memory; tiles: 5 or 3

The values equal :mod:`modulora_int8.reference` bit for bit: CB times c, rounded, times 1 / 127.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from modulora_kernels.triton import GPUKernels, block, times_group
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_int8 import reference

_INVERSE = tl.constexpr(reference.INVERSE)


@triton.jit
def decode(
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
) -> Any:  # fmt: skip
    """A block of Ŵ: :func:`modulora_kernels.triton.blocks` has the contract.

    OPTIONS is the group size G, or 0 row-wise. One scale is loaded for a group if G is a power of
    two, and for each weight if it isn't.
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


def operands(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    return packed.tensors["codes"], packed.tensors["scales"]


kernels = GPUKernels(decode, operands, lambda packed: packed.metadata["group_size"] or 0)
tile, product = kernels.tile, kernels.product
