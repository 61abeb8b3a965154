"""Row-wise INT8 in plain torch, as LLM.int8 has it: the truth that the kernels are measured against.

Symbols of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), section 2.1, absmax quantization:

    W      the weight, [out, in]
    c      the absmax of a row, or of a group of G consecutive values of a row: [out, groups], fp32
    CB     round(W · 127 / c), int8                                   equation 1
    Ŵ      CB · c / 127

The order of roundings is that of bitsandbytes 0.50: W is rounded to fp16 first, 127 / c is rounded, halves round to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
INVERSE = 1 / 127
"""Ŵ = (CB · c) · INVERSE: a product, as bitsandbytes has it, so that the bits are the same."""

HALF_RANGE = (2.0**-14, 65504.0)
"""Rows whose absmax is in fp16's normal range are rounded to fp16 first. bitsandbytes does so with every row, which
makes Inf of what is larger and zeros of what is much smaller; those rows stay in fp32 here."""


def groups(in_features: int, G: int | None) -> int:
    """How many scales a row has."""
    return 1 if G is None else -(-in_features // G)


def _grouped(W: Tensor, G: int | None) -> Tensor:
    """``[out, in]`` to ``[out, groups, G]``, the last group filled with zeros."""
    out_features, in_features = W.shape
    size = in_features if G is None else G
    n = groups(in_features, G)
    return torch.nn.functional.pad(W, (0, n * size - in_features)).reshape(out_features, n, size)


def to_half(W: Tensor) -> Tensor:
    """The fp32 weight with the rows that fp16 can hold rounded to it."""
    absmax = W.abs().amax(dim=1, keepdim=True) if W.shape[1] else W.new_zeros(W.shape[0], 1)
    fits = (absmax >= HALF_RANGE[0]) & (absmax <= HALF_RANGE[1])
    return torch.where(fits, W.to(torch.float16).to(torch.float32), W)


def quantize(W: Tensor, G: int | None = None) -> tuple[Tensor, Tensor]:
    """CB ``[out, in]`` int8 and c ``[out, groups]`` fp32 of a weight ``[out, in]`` of any float dtype (equation 1)."""
    out_features, in_features = W.shape
    blocks = _grouped(to_half(W.to(torch.float32)), G)
    c = blocks.abs().amax(dim=2)  # [out, groups]
    factor = LARGEST / torch.where(c == 0, 1.0, c)  # a group of zeros has c = 0 and codes 0
    CB = torch.round(blocks * factor[:, :, None]).to(torch.int8)
    return CB.reshape(out_features, -1)[:, :in_features].contiguous(), c


def dequantize(CB: Tensor, c: Tensor, G: int | None = None) -> Tensor:
    """Ŵ of rows ``CB`` ``[rows, in]`` with ``c`` ``[rows, groups]``: fp32 ``[rows, in]``."""
    in_features = CB.shape[1]
    scale = c if G is None else c.repeat_interleave(G, dim=1)[:, :in_features]
    return CB.to(torch.float32) * scale * INVERSE
