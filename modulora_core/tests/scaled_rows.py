"""A decoder that isn't one of our plugins', as the source of a module: whole numbers times a scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

DECODER = """
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.conversions import narrow
from modulora_core.kernels.cpu.products import RowKernels

@jit()
def decode(weight, row, start, columns, out):
    codes, scales = weight
    for r in range(len(out)):
        for k in range(columns):
            out[r, k] = narrow(codes[row + r, start + k] * scales[row + r], out[r, k])

rows, rounding_rows = RowKernels(decode), RowKernels(decode, rounds=True)
"""


def weight(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and what they stand for in float64."""
    generator = torch.Generator().manual_seed(out_features)
    codes = torch.randint(
        -128, 128, (out_features, in_features), dtype=torch.int8, generator=generator
    )
    scales = torch.rand(out_features, generator=generator) / 128
    return codes, scales, codes.double() * scales.double().unsqueeze(1)
