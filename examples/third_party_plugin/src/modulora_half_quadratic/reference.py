"""Half-quadratic quantization in plain torch. Kernels must give the same values.

Symbols of Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"
(https://mobiusml.github.io/hqq_blog/), for each group of consecutive weights of a row::

    W     the weights of the group
    q     their codes, 0 … 2^bits − 1
    s, z  scale and zero point:  Ŵ = s (q − z)
    φ     the l_p norm with p < 1, which gives a few large errors little weight
    W_e   the errors that are outliers
    β     the penalty that ties W_e to the errors; it grows by κ in each step

    min φ(W − Ŵ)  over s, z                              the problem
    min φ(W_e) + β/2 ‖W_e − (W − Ŵ)‖²  over z and W_e    half-quadratic splitting, in turn:
        W_e = shrink(W − Ŵ, β)                           sub-problem 1
        z   = mean(q − (W − W_e) / s)                    sub-problem 2

This differs from the paper in three points. We store ``b = −s z``, the value of code 0: z is too
large for fp16 if a group is nearly constant. Errors are shrunk in units of s, so that β means the
same for any magnitude of W. Unless ``fit_scale`` is off, each step fits s by least squares to its
codes. At 1 and 2 bits the range of a group is much too wide (README, Error)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modulora_half_quadratic.options import Options

KAPPA = 1.01
"""The factor κ by which β grows in each step."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16: the scale of a constant group."""

LARGEST = 65504.0
"""The largest fp16."""

UNIT_EXPONENT = 14
"""A power of two brings the largest magnitude of W just below 2¹⁴, far from both ends of fp16."""

LARGEST_WEIGHT = 2.0**120
"""W must be smaller, so that Ŵ cannot overflow in fp32."""


class Groups(NamedTuple):
    """A quantized weight in units of :func:`unit`: ``Ŵ / unit = scales · codes + offsets``.

    ``codes`` are uint8 ``[out, in]``; ``scales``, positive, and ``offsets`` are fp16 ``[out,
    groups]``."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor


def unit(W: Tensor) -> Tensor:
    """The power of two that ``scales`` and ``offsets`` are multiples of, fp32 ``[1]``.

    It is NaN if W is not finite, or too large.
    """
    low, high = (W.amin(), W.amax()) if W.numel() else (W.new_zeros(()), W.new_zeros(()))
    largest = torch.maximum(-low, high).to(torch.float32)
    # a unit below 2^-126 is no normal number
    exponent = torch.frexp(largest).exponent.clamp(min=-112)
    power = torch.ldexp(torch.ones_like(largest), exponent - UNIT_EXPONENT)
    return torch.where(largest < LARGEST_WEIGHT, power, torch.nan).reshape(1)


def quantize(W: Tensor, options: Options) -> Groups:
    """Quantize rows: ``W`` is fp32 or fp64 ``[out, in]``, contiguous, divided by its
    :func:`unit`."""
    rows, columns = W.shape
    G = options.group_size
    whole = columns // G * G
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    scales = torch.empty(rows, options.groups(columns), dtype=torch.float16, device=W.device)
    offsets = torch.empty_like(scales)
    for columns_of, groups_of, size in (
        (slice(0, whole), slice(0, whole // G), G),
        (slice(whole, columns), slice(whole // G, None), columns - whole),  # the short last group
    ):
        if rows and columns_of.stop > columns_of.start:
            q, s, b = solve(W[:, columns_of].reshape(-1, size), options)
            codes[:, columns_of] = q.view(rows, -1)
            scales[:, groups_of], offsets[:, groups_of] = s.view(rows, -1), b.view(rows, -1)
    return Groups(codes, scales, offsets)


def solve(W: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups ``W``, ``[groups, size]``.

    Returns:
        codes, uint8 ``[groups, size]``; scales and offsets, fp16 ``[groups, 1]``.
    """
    low, high = W.aminmax(dim=1, keepdim=True)
    s, b = ((high - low) / options.levels).clamp(min=SMALLEST_SCALE), low
    beta = options.beta
    for _ in range(options.iterations):
        q = nearest(W, s, b, options.levels)
        if options.fit_scale:
            s, b = least_squares(W, q, s)
        W_e = s * shrink((W - (s * q + b)) / s, beta, options.p)  # sub-problem 1
        b = (W - W_e - s * q).mean(dim=1, keepdim=True)  # sub-problem 2, times −s
        beta *= KAPPA
    s = s.clamp(SMALLEST_SCALE, LARGEST).to(torch.float16)
    b = b.clamp(-LARGEST, LARGEST).to(torch.float16)
    q = nearest(W, s.to(W.dtype), b.to(W.dtype), options.levels)
    return q.to(torch.uint8), s, b


def nearest(W: Tensor, s: Tensor, b: Tensor, levels: int) -> Tensor:
    """The codes with the nearest values, as floats; a tie takes the even code."""
    return ((W - b) / s).round_().clamp_(0, levels)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalized soft threshold, sign(x) · max(0, |x| − |x|^(p−1) / β) (Chartrand 2012).

    For p = 1 it is the usual threshold. Up to β^(−1 / (2 − p)) it is zero.
    """
    magnitude = x.abs()
    return x.sign() * (magnitude - magnitude.pow(p - 1) / beta).relu_()


def least_squares(W: Tensor, q: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The s and b, ``[groups, 1]``, with the least ‖W − (s q + b)‖. s stays if that is not
    positive."""
    mean = q.mean(dim=1, keepdim=True)
    centred = q - mean
    fitted = (centred * W).sum(dim=1, keepdim=True) / centred.square().sum(dim=1, keepdim=True)
    s = torch.where(
        fitted > SMALLEST_SCALE, fitted, s
    )  # equal codes give NaN, which is not greater
    return s, (W - s * q).mean(dim=1, keepdim=True)


def dequantize(codes: Tensor, scales: Tensor, offsets: Tensor, group_size: int) -> Tensor:
    """Ŵ, fp32 ``[rows, in]``, from codes ``[rows, in]``.

    Args:
        scales: ``[rows, groups]``, fp32, times the unit; and ``offsets`` likewise.
    """
    group = torch.arange(codes.shape[1], device=codes.device) // group_size
    return codes.to(torch.float32) * scales[:, group] + offsets[:, group]
