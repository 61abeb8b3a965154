"""Row-wise INT8 of LLM.int8() in plain torch: the truth for the kernels.

Symbols of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), section 2.1, absmax quantization::

    W      the weight, [out, in]
    c      the absmax of a row, or of G consecutive values (the last group may be short):
           [out, groups]
    CB     round(127 · W / c), int8
    Ŵ      CB · c / 127, its inverse

Values are rounded in the order of bitsandbytes 0.50: W to fp16; 1 / c; 127 times it; the product to
whole numbers, halves to even. Ŵ is (CB · c) times the fp32 value of 1 / 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127.0
INVERSE = 1 / 127

HALF_RANGE = (127 * 2.0**-24, 65520.0)
"""W is rounded to fp16 where ``HALF_RANGE[0] <= c < HALF_RANGE[1]``, and stays in fp32 elsewhere.

bitsandbytes rounds everywhere. From 65520 on that gives Inf. Below 127 · 2⁻²⁴ the steps of fp16 are
larger than c / 127, so that fp16 would decide the codes, down to all zeros.
"""

SMALLEST_ABSMAX = 1e-36
"""The least divisor, so that 127 / c is finite; a group of zeros has codes 0."""


def groups(in_features: int, G: int | None) -> int:
    """How many scales a row has."""
    return 1 if G is None else -(-in_features // G)


def grouped(W: Tensor, G: int | None) -> Tensor:
    """``[out, in]`` to ``[out, groups, G]``, the last group filled with zeros."""
    out_features, in_features = W.shape
    size = max(1, in_features) if G is None else G
    n = groups(in_features, G)
    return torch.nn.functional.pad(W, (0, n * size - in_features)).reshape(out_features, n, size)


def absmax(W: Tensor) -> Tensor:
    """The constant c of each group of ``[out, groups, G]``: ``[out, groups, 1]``."""
    return W.abs().amax(dim=2, keepdim=True)


def to_half(W: Tensor) -> Tensor:
    """Groups ``[out, groups, G]``, rounded to fp16 if their absmax is in :data:`HALF_RANGE`."""
    c = absmax(W)
    fits = (c >= HALF_RANGE[0]) & (c < HALF_RANGE[1])
    return torch.where(fits, W.to(torch.float16).to(torch.float32), W)


def quantize(W: Tensor, G: int | None = None) -> tuple[Tensor, Tensor]:
    """CB, int8 ``[out, in]``, and c, fp32 ``[out, groups]``, of the fp32 weight (section 2.1)."""
    in_features = W.shape[1]
    halves = to_half(grouped(W, G))
    c = absmax(halves)  # [out, groups, 1]
    factor = (
        c.clamp(min=SMALLEST_ABSMAX).reciprocal() * LARGEST
    )  # two roundings, as torch has 127.0 / c
    CB = torch.round(halves * factor).to(torch.int8)
    return CB.flatten(1)[:, :in_features].contiguous(), c[:, :, 0]


def dequantize(CB: Tensor, c: Tensor, G: int | None = None) -> Tensor:
    """Ŵ of rows: fp32 ``[rows, in]`` from ``CB`` ``[rows, in]`` and ``c`` ``[rows, groups]``."""
    in_features = CB.shape[1]
    scale = c if G is None else c.repeat_interleave(G, dim=1)[:, :in_features]
    return CB.to(torch.float32) * scale * INVERSE
