"""Quantize blocks: elements are rounded to nearest, and the scale is searched for.

By the specification's rule, X is the power of two that brings the largest magnitude
of a block into [4, 8). Values above 6 are cut off. NVFP4's usual rule makes X the largest magnitude
divided by 6. We also try the scales around, and keep the one with the smallest error, weighted by
H's diagonal where there is calibration data. The rule's own scale wins a tie, so that no block is
worse than by the rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_fp4.reference import BLOCK, LARGEST, block_scales

LARGEST_SCALE = 448.0
"""The largest number in E4M3."""

_SMALLEST_EXPONENT, _BIAS, _EMAX = -127, 127, 2
_LARGEST_G = 2.0**127

SMALLEST_SCALE = 2.0**-127
"""Smaller scales, whose reciprocals are infinite, count as 0."""

STEPS = {"mxfp4": (0, 1, -1), "nvfp4": (0, 1, -1, 2, -2, 3, 4, 5)}
"""Distances from the rule's code that are tried. Codes of both types grow with the scale."""

MOST = {"mxfp4": 227, "nvfp4": 126}
"""The largest code of a scale: 2¹⁰⁰, and 448."""


def global_scale(largest: Tensor) -> Tensor:
    """G of a weight whose largest magnitude is ``largest``, fp32 ``[1]``: it then has X = 448."""
    g = (LARGEST_SCALE * LARGEST / largest).clamp(max=_LARGEST_G)
    return torch.where(largest > 0, g, torch.ones_like(g))


def rule(largest: Tensor, g: Tensor | None) -> Tensor:
    """The codes of scales by the rule, int32, of blocks' largest magnitudes, fp32; g of NVFP4."""
    if g is None:
        exponent = torch.frexp(largest).exponent - 1  # of zero it is -1: any will do
        return (exponent - _EMAX).clamp(_SMALLEST_EXPONENT) + _BIAS
    X = (largest / LARGEST * g).clamp(max=LARGEST_SCALE)
    return X.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32)


def rounded(y: Tensor) -> Tensor:
    """The nearest values of E2M1, halves to even fractions; beyond 6 it is 6."""
    magnitude = y.abs().clamp_(max=LARGEST)
    power = (magnitude.clamp(min=1).view(torch.int32) & 0x7F800000).view(torch.float32)
    # values are half a power of two apart; adding 2^23 such steps rounds to them
    steps = power.mul_(2.0**22)
    return magnitude.add_(steps).sub_(steps).copysign_(y)


def codes_of(P: Tensor) -> Tensor:
    """The codes of values of E2M1, uint8: their sign, exponent and first bit of the fraction."""
    magnitude = P.abs()
    code = (magnitude.view(torch.int32) >> 22).sub_(2 * 126).clamp_(min=0)
    code += magnitude == 0.5  # the only subnormal number
    return (code + 8 * (P < 0)).to(torch.uint8)


def quantize(type: str, W: Tensor, w: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of elements and of scales.

    Args:
        type: ``"mxfp4"`` or ``"nvfp4"``.
        W: fp32 ``[rows, in]``.
        w: the weight of each column's error, fp32 ``[in]``.
        g: fp32 ``[1]``, or None for MXFP4.

    Returns:
        uint8 ``[rows, in]`` and ``[rows, in / k]``.
    """
    blocks = W.unflatten(-1, (-1, BLOCK[type]))  # [rows, blocks, k]
    weights = w.view(-1, BLOCK[type])  # [blocks, k]
    first = rule(blocks.abs().amax(-1), g)
    best = first
    least = torch.full(best.shape, torch.inf, dtype=torch.float32, device=W.device)
    for step in STEPS[type]:
        tried = (first + step).clamp(0, MOST[type])
        X = block_scales(type, tried, g)[..., None]
        error = _sum((_elements(blocks, X) * X - blocks).square_().mul_(weights))
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    X = block_scales(type, best, g)[..., None]
    return codes_of(_elements(blocks, X)).flatten(-2), best.to(torch.uint8)


def _sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, by halves: in the kernels' order."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _elements(blocks: Tensor, X: Tensor) -> Tensor:
    """P of blocks with scales ``X``; any will do where the scale is 0."""
    return rounded(blocks * reciprocals(X))


def reciprocals(X: Tensor) -> Tensor:
    """1 / X, and 1 for scales that count as 0."""
    return 1 / torch.where(X >= SMALLEST_SCALE, X, 1.0)
