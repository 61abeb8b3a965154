"""The truth that a quantizer's products and gradients are held to: dense float64 products in plain torch.

Nothing here runs code of a quantizer but its ``dequantize_tile``, once and for the whole weight, which the checks of levels 1 and 2
hold by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_core.spec import PackedWeight, Quantizer


def dense(quantizer: Quantizer, packed: PackedWeight) -> Tensor:
    """Ŵ, float64 ``[out, in]``."""
    return quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float64).clone()


def product(x: Tensor, W: Tensor, transpose: bool = False) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, in float64, for ``x: [..., features]``."""
    return x.detach().to(torch.float64) @ (W if transpose else W.T)


def product_error(y: Tensor, x: Tensor, W: Tensor, transpose: bool = False) -> float:
    """The largest error of ``y``, as a share of ``‖x_n‖ · max(‖w_o‖, ‖W‖_F / √out)``.

    The products of an entry sum up to at most ``‖x_n‖ ‖w_o‖`` in magnitude (Cauchy-Schwarz), which bounds the rounding of any order
    of the sum. In a rotated basis errors spread over all outputs: hence the root mean square over rows as a floor. Half of the smallest
    subnormal of ``y``'s dtype is no error: fp16 ends at 6e-8.
    """
    exact = product(x, W, transpose)
    if y.numel() == 0:
        return 0.0
    M = W if not transpose else W.T  # [features of y, features of x]
    rows = M.norm(dim=1)
    weight_scale = torch.maximum(rows, M.norm() / max(1, M.shape[0]) ** 0.5).clamp(min=1e-300)
    scale = x.detach().to(torch.float64).norm(dim=-1, keepdim=True).clamp(min=1e-300) * weight_scale
    smallest = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    error = ((y.detach().to(torch.float64) - exact).abs() - smallest / 2).clamp(min=0)
    return float((error / scale).nan_to_num(nan=torch.inf).max())


def relative_error(value: Tensor, exact: Tensor) -> float:
    """``‖value − exact‖ / ‖exact‖`` (Frobenius), in float64; infinite where there is NaN."""
    difference = (value.detach().to(torch.float64) - exact.detach().to(torch.float64)).norm()
    error = difference / exact.detach().to(torch.float64).norm().clamp(min=1e-300)
    return float(error.nan_to_num(nan=torch.inf))


def unlikeness(value: Tensor, exact: Tensor) -> float:
    """The relative error of the multiple of ``value`` that is nearest to ``exact``: ``√(1 − cos²)``; 1 for zeros and for NaN."""
    a, b = value.detach().to(torch.float64), exact.detach().to(torch.float64)
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300)
    return float((1 - cosine.square()).clamp(min=0).sqrt().nan_to_num(nan=1.0))


def lora(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dY: Tensor, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """A dense linear layer with a LoRA adapter in float64: its output, and gradients by torch's own autograd.

    Args:
        x: ``[n, in]``; W: ``[out, in]``; bias: ``[out]``; A: ``[r, in]``; B: ``[out, r]``; dY: ``[n, out]``, of any float dtype.
        scale: s.

    Returns:
        Y ``[n, out]`` and gradients by name: ``x``, ``A``, ``B``, and ``bias`` if there is one.
    """
    leaves = {"x": x, "A": A, "B": B} | ({} if bias is None else {"bias": bias})
    leaves = {
        name: leaf.detach().to(torch.float64).requires_grad_() for name, leaf in leaves.items()
    }
    y = leaves["x"] @ W.to(torch.float64).T + scale * (leaves["x"] @ leaves["A"].T) @ leaves["B"].T
    y = y + leaves["bias"] if bias is not None else y
    gradients = torch.autograd.grad(y, list(leaves.values()), dY.to(torch.float64))
    return y.detach(), dict(zip(leaves, gradients, strict=True))
