"""MXFP4 and NVFP4 in plain torch: the truth for the kernels.

Symbols of the OCP Microscaling specification 1.0. A row of a weight falls into blocks
of k elements::

    P    an element in E2M1: a sign, two bits of exponent, one of fraction
    X    the scale of a block
    g    NVFP4: one fp32 number, by which all scales of a weight are divided
    v    a value:  v = X P   (MXFP4),   v = (X / g) P   (NVFP4)

              k    X
    MXFP4    32    E8M0: a power of two
    NVFP4    16    E4M3: a float of 8 bits

Each operation rounds to fp32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1 by their codes."""

BLOCK = {"mxfp4": 32, "nvfp4": 16}
"""The elements of a block, k, of each type."""

LARGEST = 6.0
"""The largest element."""

LARGEST_EXPONENT = 100
"""E8M0 scales up to 2¹⁰⁰ are decoded. A larger one counts as 0: products with it would overflow."""


@cache
def levels(device: torch.device) -> Tensor:
    """The elements by their codes on a device, fp32, cached: no product sends them there again."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
def scale_values(type: str, device: torch.device) -> Tensor:
    """X of each code of a byte, fp32 ``[256]``. NaN, a sign of damage, counts as 0."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    kind = torch.float8_e8m0fnu if type == "mxfp4" else torch.float8_e4m3fn
    X = codes.view(kind).to(torch.float32).nan_to_num(nan=0.0)
    return torch.where(X > 2.0**LARGEST_EXPONENT, 0.0, X).to(device)


def block_scales(type: str, scales: Tensor, g: Tensor | None) -> Tensor:
    """X, or X / g, fp32, of codes ``scales``, uint8 of any shape."""
    X = scale_values(type, scales.device)[scales.to(torch.int32)]
    if g is None:
        return X
    return torch.where(g == 0, torch.zeros_like(X), X / g)


def unpack(codes: Tensor) -> Tensor:
    """The codes of elements, uint8 ``[rows, in]``; of two in a byte the first is the low half."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def pack(P: Tensor) -> Tensor:
    """Codes of elements, uint8 ``[rows, in]``, to bytes ``[rows, in / 2]``."""
    return P[..., 0::2] | P[..., 1::2] << 4


def dequantize(type: str, codes: Tensor, scales: Tensor, g: Tensor | None = None) -> Tensor:
    """V of whole rows, fp32 ``[rows, in]``.

    Args:
        type: ``"mxfp4"`` or ``"nvfp4"``.
        codes: uint8 ``[rows, in / 2]``.
        scales: uint8 ``[rows, in / k]``.
        g: fp32 ``[1]``, or None for MXFP4.
    """
    P = levels(codes.device)[unpack(codes).to(torch.int32)]
    X = block_scales(type, scales, g)
    values: Tensor = P.unflatten(-1, (-1, BLOCK[type])) * X[..., None]
    return values.flatten(-2)
