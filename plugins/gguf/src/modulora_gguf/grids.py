"""The types whose codes are numbers of single weights: their bits, levels and scales.

    weight = scale · level[code] + offset          as :mod:`modulora_gguf.reference` computes it

Merging moves weights to other codes and keeps the scales. The other types have codes of several
weights, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_gguf import codebooks
from modulora_gguf.bits import bits, floats, half, nibbles, split, to_bytes, words
from modulora_gguf.reference import scales_of_k

Scales = tuple[Tensor, Tensor]
"""The scale and the offset of each part of blocks, fp32 ``[n, parts]``."""


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The grid of a type.

    Attributes:
        fields: of each field of codes the first byte, the number of bytes, and the width and run
            of :func:`~modulora_gguf.bits.bits`. The field with the lowest bits comes first.
        first: the level of code 0, for levels that are whole numbers.
        codebook: the type whose table has the levels, for others.
        scales: of blocks, uint8 ``[n, bytes]``.
    """

    fields: tuple[tuple[int, int, int, int], ...]
    scales: Callable[[Tensor], Scales]
    first: int = 0
    codebook: str = ""

    def levels(self, device: torch.device) -> Tensor:
        """By code, fp32."""
        codes = torch.arange(2 ** sum(width for *_, width, _ in self.fields), device=device)
        if self.codebook:
            return codebooks.lookup(self.codebook, codes)
        return floats(codes if self.fields[0][2] < 8 else codes.to(torch.int8)) + self.first

    def codes(self, blocks: Tensor) -> Tensor:
        """The codes of blocks, uint8 ``[n, weights]``."""
        low, found = 0, None
        for start, nbytes, width, run in self.fields:
            field = bits(blocks[:, start : start + nbytes], width, run).to(torch.uint8) << low
            found, low = field if found is None else found | field, low + width
        assert found is not None
        return found

    def with_codes(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """Blocks with other codes."""
        blocks, low = blocks.clone(), 0
        for start, nbytes, width, run in self.fields:
            field = codes >> low & (1 << width) - 1
            blocks[:, start : start + nbytes], low = to_bytes(field, width, run), low + width
        return blocks


def _no_offset(scale: Tensor) -> Scales:
    return scale, torch.zeros_like(scale)


def _d(b: Tensor) -> Scales:
    return _no_offset(half(b[:, :2].contiguous()))


def _d_m(b: Tensor) -> Scales:
    d, m = split(b[:, :4], 2, 2)
    return half(d), half(m)


def _q2_k(b: Tensor) -> Scales:
    scales, _, d, dmin = split(b, 16, 64, 2, 2)
    return half(d) * floats(scales & 15), -half(dmin) * floats(scales >> 4)


def _q3_k(b: Tensor) -> Scales:
    scales, d = split(b[:, 96:], 12, 2)
    return _no_offset(half(d) * (nibbles(scales[:, :8], 8) + 16 * bits(scales[:, 8:], 2, 4) - 32))


def _affine_k(b: Tensor) -> Scales:
    d, dmin, scales = split(b[:, :16], 2, 2, 12)
    sc, m = scales_of_k(scales)
    return half(d) * sc, -half(dmin) * m


def _q6_k(b: Tensor) -> Scales:
    scales, d = split(b[:, 192:], 16, 2)
    return _no_offset(half(d) * floats(scales.view(torch.int8)))


def _iq4_xs(b: Tensor) -> Scales:
    d, high, low = split(b[:, :8], 2, 2, 4)
    shifts = torch.arange(0, 16, 2, device=b.device)
    return _no_offset(half(d) * (bits(low, 4) + 16 * floats(words(high, 2) >> shifts & 3) - 32))


GRIDS = {
    "Q4_0": BlockGrid(((2, 16, 4, 16),), _d, first=-8),
    "Q4_1": BlockGrid(((4, 16, 4, 16),), _d_m),
    "Q5_0": BlockGrid(((6, 16, 4, 16), (2, 4, 1, 1)), _d, first=-16),
    "Q5_1": BlockGrid(((8, 16, 4, 16), (4, 4, 1, 1)), _d_m),
    "Q8_0": BlockGrid(((2, 32, 8, 1),), _d),
    "Q2_K": BlockGrid(((16, 64, 2, 32),), _q2_k),
    "Q3_K": BlockGrid(((32, 64, 2, 32), (0, 32, 1, 32)), _q3_k, first=-4),
    "Q4_K": BlockGrid(((16, 128, 4, 32),), _affine_k),
    "Q5_K": BlockGrid(((48, 128, 4, 32), (16, 32, 1, 32)), _affine_k),
    "Q6_K": BlockGrid(((0, 128, 4, 64), (128, 64, 2, 32)), _q6_k, first=-32),
    "IQ4_NL": BlockGrid(((2, 16, 4, 16),), _d, codebook="IQ4_NL"),
    "IQ4_XS": BlockGrid(((8, 128, 4, 16),), _iq4_xs, codebook="IQ4_NL"),
}
"""By llama.cpp's name of the type."""
