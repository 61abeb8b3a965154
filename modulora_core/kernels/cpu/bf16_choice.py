"""In which dtype few rows of bf16 inputs are multiplied on a CPU, and how many of them are few. Doesn't import numba."""

from __future__ import annotations

import torch

from modulora_core.devices import dense_products

BF16_ROWS = 8
"""From how many rows on few-row products multiply bf16 as bf16, where the processor does: fewer are as fast in fp32, which rounds less."""

ROWS_BEFORE_AMX = 24
"""Rows up to which they are few where AMX multiplies bf16: more are multiplied by it, in less time, by kernels or with a tile by torch.
Pairs of bf16 take such a processor longer than fp32 (docs/performance-findings.md), so few rows are multiplied in fp32."""


ROWS_OF_AMX = 256
"""Rows up to which a kernel that multiplies by AMX itself is faster than a tile: of more, what is decoded is worth its way to memory."""


def dtype_of_few(rows: int, by_amx: bool = False) -> torch.dtype | None:
    """Of so many rows of bf16 inputs, where a kernel multiplies them: bf16 or fp32; None where tiles are the way.

    Args:
        by_amx: whether the kernel does so by AMX, where there is that.
    """
    if dense_products.has_bfloat16_tile_units():
        if rows <= ROWS_BEFORE_AMX:
            return torch.float32
        return torch.bfloat16 if by_amx and rows <= ROWS_OF_AMX else None
    return (
        dense_products.compute_dtype(torch.bfloat16, torch.device("cpu"))
        if rows >= BF16_ROWS
        else torch.float32
    )
