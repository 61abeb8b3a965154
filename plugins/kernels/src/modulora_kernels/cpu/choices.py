"""Choose between products of few rows and tiles, by the rows and the dtype of the inputs.

Few rows are multiplied by :mod:`modulora_kernels.cpu.products`, many by decoded tiles and
torch. The figures are in docs/explanation/performance.md.
"""

from __future__ import annotations

import torch

from modulora_core import dense_products

FEW_ROWS = 64
"""Rows up to which products of few rows are faster than tiles."""

BF16_ROWS = 8
"""Rows from which bf16 inputs are multiplied in bf16, without AMX; fewer are as fast in fp32."""

FEW_BF16_ROWS = 24
"""The same as :data:`FEW_ROWS` for bf16 inputs, if torch has instructions for tiles of bf16."""


def dtype_of_few(rows: int, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a product of few rows, fp32 or bf16; None to multiply by tiles.

    Args:
        rows: of the inputs, at least 1.
        dtype: of the layer's inputs, of at most 32 bits.
    """
    if rows > FEW_ROWS:
        return None
    if dtype is torch.bfloat16 and dense_products.has_bfloat16_units():
        if rows > FEW_BF16_ROWS:
            return None
        if rows >= BF16_ROWS and not dense_products.has_bfloat16_tile_units():
            return torch.bfloat16
    return torch.float32
