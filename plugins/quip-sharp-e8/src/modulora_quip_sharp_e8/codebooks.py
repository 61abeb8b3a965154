"""The codebooks of QuIP# (Tseng et al. 2024, arXiv 2402.04396, sections 4.2 and 4.3).

E8P12 codes eight weights in 16 bits. 256 vectors of half-integers > 0, seven free signs, and a
shift by ±1/4 make 2¹⁶ points of E8 + 1/4. E8₁ codes eight weights in 8 bits: 256 short vectors of
E8. A residual is rounded to E8₁ at 3 bits, and to E8P12 again at 4 bits.

A code of E8P12 is ``(a << 8) | s``. ``a`` counts the vectors; ``s`` has the signs, and its parity
is the side of the shift. int16 holds the bits of the unsigned code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from modulora_core.errors import OptionError

BLOCK = 8
"""Weights for each code, the dimension of E8."""

OPT_SCALE = {2: 1.03, 3: 0.98, 4: 1.03}
"""By bits: weights are scaled to this root mean square before they are rounded."""

RESIDUAL_SCALE = {3: 2.04, 4: 3.45}
"""By bits: a residual is multiplied by this before it is rounded."""

SIGN_BIT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Coordinate i takes its sign from bit ``SIGN_BIT[i]`` of a code."""

_NORM_TWELVE = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 "
    "167 157 147 156 146 045 067 057 047 056 046 014 237"
)


def norm_twelve() -> list[tuple[int, ...]]:
    """The places of the three 1/2 in each of the 29 vectors of squared norm 12; the rest is 3/2."""
    return [tuple(map(int, triple)) for triple in _NORM_TWELVE.split()]


@cache
def absolute_vectors() -> Tensor:
    """fp32 ``[256, 8]``: {1/2, 3/2, 5/2}⁸ of squared norm ≤ 10, lexicographic; 29 of norm 12."""
    short = [
        vector
        for vector in itertools.product((0.5, 1.5, 2.5), repeat=BLOCK)
        if sum(v * v for v in vector) <= 10
    ]
    long = [[0.5 if i in triple else 1.5 for i in range(BLOCK)] for triple in norm_twelve()]
    return torch.tensor([*short, *long], device="cpu")


@cache
def e8p() -> Tensor:
    """The point of each code of E8P12: fp32 ``[65536, 8]``, shared: do not write to it."""
    codes = torch.arange(1 << 16, device="cpu")
    vectors = absolute_vectors()[codes >> 8]
    odd = vectors.sum(-1).long() % 2  # one more sign makes the vector's sum even
    parity = torch.stack([codes >> bit & 1 for bit in range(8)]).sum(0) % 2
    negated = torch.stack([(codes ^ parity) >> bit & 1 for bit in SIGN_BIT], dim=-1)
    negated[:, 7] ^= odd
    shift = 0.25 - 0.5 * parity
    return vectors * (1 - 2 * negated) + shift[:, None]


@cache
def e81() -> Tensor:
    """The point of each code of E8₁: fp32 ``[256, 8]``, shared: do not write to it.

    Integers of even sum and squared norm ≤ 2, then (±1/2)⁸ of even sum, both lexicographic; then
    ±2 in one coordinate.
    """
    whole = [
        v for v in itertools.product((-1.0, 0.0, 1.0), repeat=BLOCK) if sum(map(abs, v)) in (0, 2)
    ]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=BLOCK) if sum(v) % 2 == 0]
    axes = 2 * torch.eye(BLOCK, device="cpu")
    return torch.cat(
        [torch.tensor(whole, device="cpu"), torch.tensor(half, device="cpu"), axes, -axes[:7]]
    )


@cache
def on(table: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A codebook on a device, cached: sending it to a GPU takes longer than a lookup."""
    return table().to(device)


def e8p_points(codes: Tensor) -> Tensor:
    """The points of codes of E8P12, of any integer dtype and shape: fp32 ``[..., 8]``."""
    return on(e8p, codes.device)[codes.long() & 0xFFFF]


def e81_points(codes: Tensor) -> Tensor:
    """The points of codes of E8₁, of any integer dtype and shape: fp32 ``[..., 8]``."""
    return on(e81, codes.device)[codes.long()]


def decode(codes: Tensor, residual: Tensor | None, bits: int) -> Tensor:
    """C, the rows of numbers that codes mean, in units of the codebook: fp32 ``[rows, 8 blocks]``.

    Kernels give the same bits. A residual's point is multiplied by the fp32 number nearest to
    1 / ``RESIDUAL_SCALE[bits]``, rounded, and added, rounded.

    Args:
        codes: int16 ``[rows, blocks]``, codes of E8P12.
        residual: None at 2 bits; uint8 ``[rows, blocks]``, codes of E8₁, at 3; int16 at 4.
        bits: 2, 3 or 4.

    Raises:
        OptionError: another width, or a residual that does not fit it.
    """
    if bits not in OPT_SCALE or (residual is None) != (bits == 2):
        raise OptionError(
            "quip-sharp-e8: expected 2 bits without a residual, or 3 or 4 with one, got "
            f"{bits} bits {'without' if residual is None else 'with'} one"
        )
    values = e8p_points(codes)
    if residual is not None:
        points = e81_points(residual) if bits == 3 else e8p_points(residual)
        values = values + points * residual_step(bits)  # a number for torch, on any device
    return values.flatten(-2)


def residual_step(bits: int) -> Tensor:
    """The factor of a residual's point: 1 / ``RESIDUAL_SCALE[bits]``, a fp32 scalar tensor."""
    return torch.tensor(1 / RESIDUAL_SCALE[bits], dtype=torch.float32, device="cpu")


def nearest_brute(x: Tensor, points: Tensor) -> Tensor:
    """The index of the nearest point to each row of ``x`` ``[n, 8]``: int64 ``[n]``.

    argmin |x − g|² = argmax 2 x·g − |g|². It looks at every row of ``points``, ``[p, 8]``, in the
    dtype of both, with ``4 n p`` bytes of scratch.
    """
    return torch.addmm(-points.square().sum(-1), x, points.t(), alpha=2).argmax(-1)
