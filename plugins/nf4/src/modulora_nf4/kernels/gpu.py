"""NF4 on a GPU, in Triton: the decode function, and tiles of the flat weight.

    moves      4 bits of codes a weight and 32 / B of scales: 0.5625 bytes for B = 64;
               a tile writes 4 (fp32) or 2 (bf16, fp16) more
    computes   a shift and a mask, one lookup, one product with the scale, for each weight
    floor      those bytes at the rate of memory; a level is loaded from 64 bytes in the L1 cache

The values equal :mod:`modulora_nf4.reference` bit for bit. Symbols as there: B, c₁, c₂, q₂.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from modulora_kernels.triton import (
    ALIGNED,
    GPUKernels,
    block,
    ceil_div,
    interleaved,
    times_group,
    write_tile,
)
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_nf4 import reference

_ZEROS = tl.constexpr(reference.ZERO * 17)  # both codes of a byte
_NESTED_SHIFT = tl.constexpr(reference.NESTED_BLOCK_SIZE.bit_length() - 1)
_ALIGNED = tl.constexpr(ALIGNED)


@triton.jit
def constants(weight, blocks, inside, DOUBLE: tl.constexpr) -> Any:
    """c₂ of the blocks, fp32; 0 where not ``inside``."""
    if DOUBLE:
        _codes, _levels, _pairs, q2, c1, mean, dynamic_map = weight
        q = tl.load(q2 + blocks, mask=inside, other=0).to(tl.int32)
        c = tl.load(c1 + (blocks >> _NESTED_SHIFT), mask=inside, other=0.0)
        return tl.where(inside, tl.load(dynamic_map + q) * c + tl.load(mean), 0.0)
    else:  # noqa: RET505 - Triton compiles what stands after a branch that returns
        _codes, _levels, _pairs, c2 = weight
        return tl.load(c2 + blocks, mask=inside, other=0.0)


@triton.jit
def decode(
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
) -> Any:  # fmt: skip
    """A block of Ŵ: :func:`modulora_kernels.triton.blocks` has the contract.

    OPTIONS is ``(shift, whole, double)``: B = 2^shift; whether each row begins with a block of
    weights; double quantization. In other rows, which are rare, each weight finds its own byte and
    scale, several times slower.
    """
    SHIFT: tl.constexpr = OPTIONS[0]
    codes, levels, pairs = weight[0], weight[1], weight[2]
    if not OPTIONS[1] or BLOCK_IN == 1:
        at, inside = block(row, col, out_features, in_features, BLOCK_OUT, BLOCK_IN)
        byte = tl.load(codes + (at >> 1), mask=inside, other=_ZEROS).to(tl.int32)
        level = tl.load(levels + ((byte >> (4 - 4 * (at & 1)).to(tl.int32)) & 0xF))
        w = level * constants(weight, at >> SHIFT, inside, OPTIONS[2])
    else:
        HALF: tl.constexpr = BLOCK_IN // 2
        pair, inside = block(row, col // 2, out_features, pairs, BLOCK_OUT, HALF)
        byte = tl.load(codes + pair, mask=inside, other=_ZEROS).to(tl.int32)
        level = interleaved(tl.load(levels + (byte >> 4)), tl.load(levels + (byte & 0xF)))
        B: tl.constexpr = min(1 << SHIFT, BLOCK_IN, _ALIGNED)
        SHARED: tl.constexpr = (1 << SHIFT) // B  # groups of one block of weights
        group, inside = block(
            row, col // B, out_features, ceil_div(in_features, B), BLOCK_OUT, BLOCK_IN // B
        )
        w = times_group(level, constants(weight, group // SHARED, inside, OPTIONS[2]))
    return w


def operands(packed: PackedWeight) -> tuple[Tensor | int, ...]:
    """The ``weight`` of :func:`decode`, whose rows have ``packed.shape[1]`` elements."""
    return _operands(packed, packed.shape[1])


def _operands(packed: PackedWeight, row: int) -> tuple[Tensor | int, ...]:
    """Rows of ``row`` elements; Triton sees whether their number of bytes is a multiple of 16."""
    tensors = packed.tensors
    levels, dynamic_map = _tables(packed.device)
    shared = tensors["codes"], levels, (row + 1) // 2
    if not packed.metadata["double_quant"]:
        return *shared, tensors["absmax"]
    nested = tensors["absmax_codes"], tensors["nested_absmax"], tensors["offset"]
    return *shared, *nested, dynamic_map


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels and the dynamic map, fp32, on ``device``."""
    levels = torch.tensor(reference.LEVELS, dtype=torch.float32, device=device)
    return levels, reference.dynamic_map().to(device)


def options(packed: PackedWeight) -> tuple[int, bool, bool]:
    """The ``OPTIONS`` of :func:`decode`."""
    return _options(packed, packed.shape[1] % max(2, packed.metadata["block_size"]) == 0)


def _options(packed: PackedWeight, whole: bool) -> tuple[int, bool, bool]:
    return packed.metadata["block_size"].bit_length() - 1, whole, packed.metadata["double_quant"]


product = GPUKernels(decode, operands, options).product


def tile(packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows ``[start, stop)`` of Ŵ in any float dtype.

    The weight is one long row here, as the format has it, so every block begins a group whatever
    the shape.
    """
    out_features, in_features = packed.shape
    numel, align = out_features * in_features, min(max(packed.metadata["block_size"], 32), ALIGNED)
    out = torch.empty(rows[1] - rows[0], in_features, dtype=dtype, device=packed.device)
    columns = rows[0] * in_features, rows[1] * in_features
    weight, constants = _operands(packed, numel), _options(packed, True)
    write_tile(
        decode, weight, out.view(1, -1), (0, 1), (1, numel), constants, columns=columns, align=align
    )
    return out
