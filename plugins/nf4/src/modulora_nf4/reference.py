"""NF4 in plain torch, in the paper's symbols: the truth for the kernels.

Symbols of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section 3:

    W     the weight, flattened row-major, in blocks of B values; the last may be short
    q     a 4-bit code for each value: the index of its level
    c₂    the quantization constant of a block: max |W| over the block, fp32
    c₁    with double quantization, the constant of 256 consecutive c₂

    dequant(c₂, q)            = level[q] · c₂                                      equation 2
    doubleDequant(c₁, q₂, q)  = dequant(map[q₂] · c₁ + mean(c₂), q)                equation 6

The paper leaves choices: ties, the order of roundings, a block of zeros. This module follows
bitsandbytes 0.50 on the CPU, bit for bit; a comment says so.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels, appendix E: equal shares of a normal distribution (equation 4), and zero."""

ZERO = LEVELS.index(0.0)
"""The code of zero."""

SMALLEST_ABSMAX = 1e-38
"""The least divisor, so that a block of zeros does not divide by zero."""

NESTED_BLOCK_SIZE = 256
"""How many c₂ share a c₁."""


def blocks(numel: int, B: int) -> int:
    """How many blocks of ``B`` hold ``numel`` values."""
    return -(-numel // B)


def constants(W: Tensor, B: int) -> Tensor:
    """Max |W| over each block: ``[numel]`` to ``[blocks]``."""
    n = blocks(W.numel(), B)
    padded = torch.nn.functional.pad(W, (0, n * B - W.numel()))
    return padded.reshape(n, B).abs().amax(dim=1)


def spread(c: Tensor, B: int, start: int, stop: int) -> Tensor:
    """The constants of elements ``[start, stop)``; ``c`` begins with block ``start // B``."""
    return c.repeat_interleave(B)[start % B :][: stop - start]


def quantize(W: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Codes q, uint8 ``[numel]``, and c₂, fp32 ``[blocks]``, of the flat W (equation 1)."""
    c2 = constants(W, B)
    divisor = c2.clamp(min=SMALLEST_ABSMAX)
    scaled = W * spread(1 / divisor, B, 0, W.numel())
    if W.numel() % B:  # bitsandbytes divides in a short block, and stores the divisor
        tail = W.numel() // B * B
        scaled[tail:] = W[tail:] / divisor[-1]
        c2[-1] = divisor[-1]
    level = levels(W.device)
    midpoints = (level[:-1] + level[1:]) / 2
    q = torch.bucketize(scaled, midpoints, out_int32=True)  # midpoint[q-1] < scaled <= midpoint[q]
    return q.to(torch.uint8), c2


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels on a device, fp32, cached: no product sends them there again."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def dequantize(q: Tensor, c2: Tensor, B: int, start: int = 0) -> Tensor:
    """Ŵ of the elements ``start ...`` (equation 2); ``c2`` begins with block ``start // B``."""
    return levels(q.device)[q.to(torch.int32)] * spread(c2, B, start, start + q.numel())


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the signed dynamic type (arXiv 1511.04561), ascending, fp32, cached.

    For i = 0 … 6 the decade 10^(i−6) has 2^i values of each sign: the midpoints of 2^i equal bins
    of [0.1, 1]. With 0 and 1 that is 2 · 127 + 2.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        decade = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def mean_of(c2: Tensor) -> Tensor:
    """The mean of all c₂, fp32 ``[]``, or 0; the order of torch's sum decides its last bit."""
    return c2.mean() if c2.numel() else c2.new_zeros(())


def codes_of_points(device: torch.device | str = "cpu") -> Tensor:
    """The codes q₂, uint8, of bitsandbytes' grid: 65536 points over [-1, 1]."""
    level = dynamic_map(device)
    midpoints = (level[:-1] + level[1:]) / 2
    points = torch.arange(65536, device=device)
    values = 2 * points.to(torch.float32) / 65535 - 1
    return torch.bucketize(values, midpoints, out_int32=True).to(torch.uint8)


def double_quantize(c2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q₂, uint8 ``[blocks]``, c₁, fp32 ``[blocks / 256]``, and the mean, ``[1]``, of c₂."""
    mean = mean_of(c2)
    centred = c2 - mean  # c₂ is positive: around zero the signed map is used whole
    c1 = constants(centred, NESTED_BLOCK_SIZE)
    per_block = spread(c1, NESTED_BLOCK_SIZE, 0, c2.numel())
    scaled = (centred * (1 / per_block)).clamp(-1, 1)
    # bitsandbytes takes code 0 in a block of zeros; an infinite 1 / c₁ makes NaN of zero
    scaled = torch.where(per_block == 0, -1.0, scaled.nan_to_num(nan=-1.0))
    # the code that is nearest to the grid point, not to the value
    point = ((scaled + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
    return codes_of_points(c2.device)[point], c1, mean.reshape(1)


def double_dequantize(q2: Tensor, c1: Tensor, mean: Tensor, start: int = 0) -> Tensor:
    """c₂ of the blocks ``start ...`` (inside equation 6); ``c1`` begins with ``start // 256``."""
    per_block = spread(c1, NESTED_BLOCK_SIZE, start, start + q2.numel())
    return dynamic_map(q2.device)[q2.to(torch.int32)] * per_block + mean
