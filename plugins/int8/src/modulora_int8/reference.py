"""Row-wise INT8 in plain torch, as LLM.int8 has it: the truth that the kernels are measured against.

Symbols of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), sections 2.1 (absmax quantization) and 3.1 (one
constant for each row of the weight, "vector-wise"), and of bitsandbytes for what they don't name:

    W      the weight, [out, in]
    c      the absmax of a row, or of a group of G consecutive values of a row: fp32 [out, groups]
    CB     round(127 / c · W), int8 [out, in]
    Ŵ      CB · c / 127

The order of roundings is that of bitsandbytes 0.50 on the CPU, bit for bit: W is rounded to fp16, 1 / c and
127 · (1 / c) are rounded, halves go to even, and Ŵ multiplies by 1 / 127 instead of dividing.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
"""The largest code; −128 is not used."""

INVERSE = 1 / LARGEST


def groups(in_features: int, G: int | None) -> int:
    """How many constants a row has."""
    return 1 if G is None else -(-in_features // G)


def to_half(W: Tensor) -> Tensor:
    """``W`` rounded to fp16 as bitsandbytes does, then widened to fp32: ``[out, in]``.

    A row that fp16 doesn't hold at all, because its absmax would become Inf or 0, stays as it is: bitsandbytes
    loses it, and with c in fp32 the format has no need to.
    """
    half = W.to(torch.float16).to(torch.float32)
    if W.shape[1] == 0:
        return half
    absmax = half.abs().amax(dim=1, keepdim=True)
    return torch.where((absmax > 0) & absmax.isfinite(), half, W.to(torch.float32))


def quantize(W: Tensor, G: int | None = None) -> tuple[Tensor, Tensor]:
    """CB, int8 ``[out, in]``, and c, fp32 ``[out, groups]``, of a weight ``[out, in]`` of any float dtype."""
    out_features, in_features = W.shape
    n = groups(in_features, G)
    size = in_features if G is None else min(G, in_features)
    padded = torch.nn.functional.pad(to_half(W), (0, n * size - in_features))
    blocks = padded.reshape(out_features, n, size)
    c = blocks.abs().amax(dim=2) if size else W.new_zeros(out_features, n, dtype=torch.float32)
    factor = torch.where(c == 0, 0.0, 1 / c * LARGEST)  # a row of zeros has c = 0 and codes 0
    CB = torch.round(blocks * factor[:, :, None]).to(torch.int8)
    return CB.reshape(out_features, n * size)[:, :in_features].contiguous(), c


def dequantize(CB: Tensor, c: Tensor, G: int | None = None) -> Tensor:
    """Ŵ of rows ``CB`` ``[rows, in]`` with their ``c`` ``[rows, groups]``: fp32 ``[rows, in]``."""
    in_features = CB.shape[1]
    per_column = c if G is None else c.repeat_interleave(min(G, in_features), dim=1)[:, :in_features]
    return CB.to(torch.float32) * per_column * INVERSE
