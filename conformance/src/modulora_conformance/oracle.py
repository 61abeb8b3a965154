"""Computes dense float64 products in plain torch, and measures errors against them.

It runs no code of a quantizer except ``dequantize_tile``, once for the whole weight. The checks of
levels 1 and 2 test that method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_conformance.cases import tile
from modulora_core.spec import PackedWeight, Quantizer


def dense(quantizer: Quantizer, packed: PackedWeight) -> Tensor:
    """Ŵ, float64 ``[out, in]``."""
    return tile(quantizer, packed, torch.float64).clone()


def product_error(y: Tensor, x: Tensor, W: Tensor, transpose: bool = False) -> float:
    """The largest error of ``y``, as a share of ``‖x_n‖ · max(‖w_o‖, ‖W‖_F / √out)``.

    The terms of an entry sum up to at most ``‖x_n‖ ‖w_o‖`` (Cauchy-Schwarz), which bounds the
    rounding for any order. A rotated basis spreads errors over all outputs: hence the mean over
    rows as a floor. Half of the smallest subnormal of ``y``'s dtype is no error."""
    if y.numel() == 0:
        return 0.0
    M = W.T if transpose else W  # [features of y, features of x]
    x64 = x.detach().to(torch.float64)
    floor = M.norm() / max(1, M.shape[0]) ** 0.5
    row_scale = torch.maximum(M.norm(dim=1), floor).clamp(min=1e-300)
    scale = x64.norm(dim=-1, keepdim=True).clamp(min=1e-300) * row_scale
    subnormal = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    error = ((y.detach().to(torch.float64) - x64 @ M.T).abs() - subnormal / 2).clamp(min=0)
    return float((error / scale).nan_to_num(nan=torch.inf).max())


def relative_error(value: Tensor, exact: Tensor) -> float:
    """``‖value − exact‖ / ‖exact‖`` (Frobenius) in float64; infinite for NaN."""
    a, b = (t.detach().to(torch.float64) for t in (value, exact))
    return float(((a - b).norm() / b.norm().clamp(min=1e-300)).nan_to_num(nan=torch.inf))


def tile_error(value: Tensor, exact: Tensor) -> float:
    """The largest error, as a share of the largest magnitude of ``exact``; infinite for NaN."""
    difference = (value.double() - exact.double()).abs().nan_to_num(nan=torch.inf)
    return float(difference.max() / exact.double().abs().max())


def unlikeness(value: Tensor, exact: Tensor) -> float:
    """``√(1 − cos²)``: the relative error of the best multiple of ``value``; 1 for zeros and
    NaN."""
    a, b = (t.detach().to(torch.float64) for t in (value, exact))
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300)
    return float((1 - cosine.square()).clamp(min=0).sqrt().nan_to_num(nan=1.0))
