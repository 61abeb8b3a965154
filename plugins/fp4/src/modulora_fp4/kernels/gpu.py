"""FP4 on a GPU, in Triton: the decode function.

    moves      4 bits of codes and 8 / k of scales for each weight: 0.53 (mxfp4) or 0.56 bytes;
               a tile writes 4 (fp32) or 2 (bf16, fp16) more
    computes   a shift and a mask, one lookup, one product with the scale, for each weight
    floor      those bytes at the rate of memory; a level is loaded from 64 bytes in the L1 cache

The values equal :mod:`modulora_fp4.reference` bit for bit. Symbols as there: k, X, g.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from modulora_kernels.triton import GPUKernels, block, interleaved, times_group
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_fp4 import reference


@triton.jit
def decode(
    weight, row, col, out_features, in_features,  # noqa: ARG001 - a row's bytes are in weight
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
) -> Any:  # fmt: skip
    """A block of Ŵ: :func:`modulora_kernels.triton.blocks` has the contract.

    OPTIONS is ``(k, divided)``; whether scales are divided by g.
    """
    codes, scales, pairs, groups = weight[0], weight[1], weight[2], weight[3]
    levels, values = weight[4], weight[5]
    HALF: tl.constexpr = BLOCK_IN // 2
    pair, inside = block(row, col // 2, out_features, pairs, BLOCK_OUT, HALF)
    byte = tl.load(codes + pair, mask=inside, other=0).to(tl.int32)
    level = interleaved(tl.load(levels + (byte & 0xF)), tl.load(levels + (byte >> 4)))
    K: tl.constexpr = OPTIONS[0]
    G: tl.constexpr = min(K, BLOCK_IN)  # columns of a group, of which a block may have several
    parts = groups * (K // G)
    group, inside = block(row, col // G, out_features, parts, BLOCK_OUT, BLOCK_IN // G)
    code = tl.load(scales + group // (K // G), mask=inside, other=0).to(tl.int32)
    X = tl.load(values + code)
    if OPTIONS[1]:
        g = tl.load(weight[6])
        X = tl.where(g == 0.0, 0.0, tl.div_rn(X, tl.broadcast_to(g, X.shape)))
    return times_group(level, X)


def operands(packed: PackedWeight) -> tuple[Tensor | int, ...]:
    """The ``weight`` of :func:`decode`.

    Triton sees whether the number of bytes of a row is a multiple of 16.
    """
    tensors, kind = packed.tensors, packed.metadata["type"]
    codes, scales = tensors["codes"], tensors["scales"]
    tables = _levels(packed.device), reference.scale_values(kind, packed.device)
    shared = codes, scales, codes.shape[1], scales.shape[1], *tables
    g = tensors.get("global_scale")
    return shared if g is None else (*shared, g)


@cache
def _levels(device: torch.device) -> Tensor:
    """The 16 levels, fp32, on ``device``."""
    return torch.tensor(reference.LEVELS, dtype=torch.float32, device=device)


def options(packed: PackedWeight) -> tuple[int, bool]:
    """The ``OPTIONS`` of :func:`decode`."""
    return reference.BLOCK[packed.metadata["type"]], "global_scale" in packed.tensors


kernels = GPUKernels(decode, operands, options)
tile, product = kernels.tile, kernels.product
