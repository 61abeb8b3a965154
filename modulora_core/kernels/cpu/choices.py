"""Choose the loops that multiply so many rows of inputs by a packed weight on this processor.

products     few rows
blocks       32 to 512 rows in fp32, where torch multiplies by MKL: as fast there, without a tile
amx          many rows, where the processor has AMX
none         decoded tiles, which torch multiplies
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple

import torch

from modulora_core import dense_products
from modulora_core.kernels.cpu import amx
from modulora_core.kernels.cpu.vectors import has

FEW_ROWS = 64
"""Rows up to which products of few rows are faster than tiles."""

BF16_ROWS = 8
"""Rows from which bf16 inputs are multiplied in bf16; fewer are as fast in fp32."""

LEAST_ROWS, MOST_ROWS = 32, 512
"""Rows for which blocks of sums are the fastest way: their sums stay in the cache."""

LEAST_ROWS_BY_AMX = {1: 25, 2: 32, 3: 64}
"""Rows from which AMX is faster, by slices of a number: bf16 has one.

Fewer rows of bf16 are multiplied in fp32.
"""

MOST_ROWS_BY_AMX = 256
"""Rows of bf16 up to which AMX is faster than tiles that torch multiplies."""

LEAST_FOR_AMX = 2**18
"""Values of a weight from which slicing the inputs for AMX pays."""


class Way(NamedTuple):
    """How to multiply.

    Attributes:
        loops: the module of loops.
        dtype: fp32 or bf16, of inputs and of decoded weights.
        slices: bf16 slices of a number, for AMX.
    """

    loops: Literal["products", "blocks", "amx"]
    dtype: torch.dtype
    slices: int = 1


def way_for(rows: int, dtype: torch.dtype, shape: tuple[int, int]) -> Way | None:
    """The fastest way; None for tiles.

    Args:
        rows: of the inputs, at least 1.
        dtype: of the layer's inputs, of at most 32 bits.
        shape: of the weight.
    """
    is_bf16 = dtype is torch.bfloat16
    if dense_products.has_bfloat16_tile_units():
        slices = 1 if is_bf16 else precision_slices()
        many = rows >= LEAST_ROWS_BY_AMX[slices]
        large = math.prod(shape) >= LEAST_FOR_AMX and amx.available()
        if many and large and not (is_bf16 and rows > MOST_ROWS_BY_AMX):
            return Way("amx", torch.bfloat16 if is_bf16 else torch.float32, slices)
        if many and is_bf16:
            return None
    elif is_bf16 and rows >= BF16_ROWS and dense_products.has_bfloat16_units():
        return Way("products", torch.bfloat16) if rows <= FEW_ROWS else None
    if LEAST_ROWS <= rows <= MOST_ROWS and blocks_are_faster():
        return Way("blocks", torch.float32)
    return Way("products", torch.float32) if rows <= FEW_ROWS else None


def precision_slices() -> int:
    """Slices of an fp32 number, by torch's matmul precision; three are exact."""
    return 3 if dense_products.float32_precision() == "highest" else 2


@cache
def blocks_are_faster() -> bool:
    """Whether blocks of sums are as fast as torch's products: with AVX2, beside MKL."""
    return (has("avx2") or has("avx512f")) and not dense_products.onednn_is_faster()
