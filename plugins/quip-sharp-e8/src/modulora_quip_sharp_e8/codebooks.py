"""QuIP#'s codebooks (Tseng et al. 2024, arXiv 2402.04396, sections 4.1 and 4.3): tables, and what codes mean. This is the truth.

E8P12, 16 bits for 8 weights: 256 vectors of half-integers > 0, with seven free signs, moved by 1/4 to one side or the other: 2¹⁶
points of the lattice E8 + 1/4. E8₁, 8 bits for 8 weights: the 256 shortest of E8 or nearly so. It codes what E8P12 leaves
over at 3 bits; at 4 bits E8P12 itself does.

A code of E8P12 is ``(a << 8) | s``: ``a`` counts the vectors, ``s`` has the signs and, as its parity, the side. It is kept in int16,
whose bits are those of the unsigned code.
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
"""By bits: the root mean square that weights are scaled to before they are rounded."""

RESIDUAL_SCALE = {3: 2.04, 4: 3.45}
"""By bits: what E8P12 leaves over is multiplied by this before it is rounded in turn."""

SIGN_BIT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Coordinate i takes its sign from bit ``SIGN_BIT[i]`` of a code."""

_NORM_TWELVE = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 "
    "167 157 147 156 146 045 067 057 047 056 046 014 237"
)


def norm_twelve() -> list[tuple[int, ...]]:
    """The positions of the three 1/2 in each of the 29 vectors of squared norm 12; their other coordinates are 3/2."""
    return [tuple(map(int, triple)) for triple in _NORM_TWELVE.split()]


@cache
def absolute_vectors() -> Tensor:
    """fp32 ``[256, 8]``: all of {1/2, 3/2, 5/2}⁸ of squared norm ≤ 10, lexicographic, and 29 of squared norm 12."""
    short = [
        vector
        for vector in itertools.product((0.5, 1.5, 2.5), repeat=BLOCK)
        if sum(v * v for v in vector) <= 10
    ]
    long = [[0.5 if i in triple else 1.5 for i in range(BLOCK)] for triple in norm_twelve()]
    return torch.tensor([*short, *long])


@cache
def e8p() -> Tensor:
    """fp32 ``[65536, 8]``: the point of each code of E8P12. Read-only."""
    codes = torch.arange(1 << 16)
    vectors = absolute_vectors()[codes >> 8]
    odd = vectors.sum(-1).long() % 2  # one more sign makes the vector's sum even
    parity = torch.stack([codes >> bit & 1 for bit in range(8)]).sum(0) % 2
    negated = torch.stack([(codes ^ parity) >> bit & 1 for bit in SIGN_BIT], dim=-1)
    negated[:, 7] ^= odd
    shift = 0.25 - 0.5 * parity
    return vectors * (1 - 2 * negated) + shift[:, None]


@cache
def e81() -> Tensor:
    """fp32 ``[256, 8]``: the point of each code of E8₁. Read-only.

    Integers of even sum and squared norm ≤ 2, then (±1/2)⁸ of even sum, both lexicographic; then ±2 in one coordinate.
    """
    whole = [
        v for v in itertools.product((-1.0, 0.0, 1.0), repeat=BLOCK) if sum(map(abs, v)) in (0, 2)
    ]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=BLOCK) if sum(v) % 2 == 0]
    axes = 2 * torch.eye(BLOCK)
    return torch.cat([torch.tensor(whole), torch.tensor(half), axes, -axes[:7]])


@cache
def on(table: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A table on ``device``, kept there: to send 2 MiB to a GPU takes longer than a look-up."""
    return table().to(device)


def e8p_points(codes: Tensor) -> Tensor:
    """Look up codes of E8P12.

    Args:
        codes: any integer dtype and shape; of int16 the bits are the unsigned code.

    Returns:
        fp32 ``[..., 8]``.
    """
    return on(e8p, codes.device)[codes.long() & 0xFFFF]


def e81_points(codes: Tensor) -> Tensor:
    """Look up codes of E8₁: any integer dtype and shape, 0 to 255, to fp32 ``[..., 8]``."""
    return on(e81, codes.device)[codes.long()]


def decode(codes: Tensor, residual: Tensor | None, bits: int) -> Tensor:
    """C of :mod:`modulora_quip_sharp_e8.reference`: the rows that codes stand for, in units of the codebook.

    At 3 and 4 bits the residual's point is multiplied by the fp32 number nearest to 1 / ``RESIDUAL_SCALE[bits]``, rounded, and
    added, rounded: kernels give these bits.

    Args:
        codes: int16 ``[rows, blocks]``, codes of E8P12.
        residual: none at 2 bits; at 3 uint8 ``[rows, blocks]``, codes of E8₁; at 4 int16 likewise, codes of E8P12.
        bits: 2, 3 or 4.

    Returns:
        fp32 ``[rows, 8 · blocks]``.

    Raises:
        OptionError: another width, or a residual that is missing or one too many.
    """
    if bits not in OPT_SCALE or (residual is None) != (bits == 2):
        raise OptionError(
            f"quip-sharp-e8: expected 2 bits without a residual, or 3 or 4 with one, got {bits} bits "
            f"{'without' if residual is None else 'with'} one"
        )
    values = e8p_points(codes)
    if residual is not None:
        points = e81_points(residual) if bits == 3 else e8p_points(residual)
        values = values + points * residual_step(bits).to(points.device)
    return values.flatten(-2)


def residual_step(bits: int) -> Tensor:
    """What a residual's point is multiplied by: 1 / ``RESIDUAL_SCALE[bits]``, fp32, no dimensions."""
    return torch.tensor(1 / RESIDUAL_SCALE[bits], dtype=torch.float32)


def nearest_brute(x: Tensor, points: Tensor) -> Tensor:
    """The index of the nearest of ``points`` ``[p, 8]`` to each of ``x`` ``[n, 8]``: int64 ``[n]``, in the operands' precision.

    argmin |x − g|² = argmax 2 x·g − |g|². It looks at every point, with ``4 n p`` bytes of scratch.
    """
    return torch.addmm(-points.square().sum(-1), x, points.t(), alpha=2).argmax(-1)
