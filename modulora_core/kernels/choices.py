"""Choose how a CPU multiplies so many rows of inputs by a packed weight. Importing this module does not import numba.

few rows        decoded strips are multiplied from the L1 cache
32 to 512       blocks of sums (:mod:`modulora_core.kernels.cpu.block_templates`), where torch multiplies by MKL
25 and more     AMX (:mod:`modulora_core.kernels.cpu.amx`), where the processor has it
more            decoded tiles are multiplied by torch
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import torch

from modulora_core.devices import dense_products

FEW_ROWS = 64
"""Rows up to which strips are faster than tiles."""

BF16_ROWS = 8
"""Rows from which bf16 inputs are multiplied as bf16, on a processor that does: fewer are as fast in fp32, which rounds less."""

LEAST_ROWS = 32
"""Rows from which blocks of sums are as fast as strips: a whole panel."""

MOST_ROWS = 512
"""Rows whose sums stay in the cache. With more, a tile is worth its way to memory."""

LARGE = 2**20
"""Values of a weight whose tile leaves the L2 cache. With fewer, a tile is faster from half as many rows on."""

ROWS_BEFORE_AMX = 24
"""Rows up to which a processor with AMX multiplies bf16 inputs in fp32: AVX-512's bf16 is slower there."""

ROWS_OF_AMX = 256
"""Rows of bf16 up to which our AMX kernel is faster than a tile multiplied by torch."""

LEAST_ROWS_OF_SLICES = {1: ROWS_BEFORE_AMX + 1, 2: 32, 3: 64}
"""Rows from which AMX multiplies, by the number of bf16 slices of an input: one of bf16, two or three of fp32."""

LEAST_FOR_AMX = 2**18
"""Values of a weight from which AMX is worth slicing the inputs."""


def dtype_of_few(rows: int, by_amx: bool = False) -> torch.dtype | None:
    """The dtype in which a kernel multiplies bf16 inputs; None to multiply tiles.

    Args:
        rows: of the inputs.
        by_amx: whether the kernel may use AMX.
    """
    if dense_products.has_bfloat16_tile_units():
        if rows <= ROWS_BEFORE_AMX:
            return torch.float32
        return torch.bfloat16 if by_amx and rows <= ROWS_OF_AMX else None
    if rows < BF16_ROWS:
        return torch.float32
    return dense_products.compute_dtype(torch.bfloat16, torch.device("cpu"))


def slices() -> int:
    """The number of bf16 slices of an fp32 number for AMX: three are as exact as fp32.

    Two, where ``torch.set_float32_matmul_precision`` asks for less than ``"highest"``.
    """
    return 3 if dense_products.float32_precision() == "highest" else 2


def most_rows(shape: tuple[int, int]) -> int:
    """Rows up to which blocks of sums are faster than tiles of a weight of this shape."""
    return MOST_ROWS if math.prod(shape) >= LARGE else MOST_ROWS // 2


@cache
def decoded_bytes() -> int:
    """Bytes of Ŵ that a thread decodes at once: three tenths of its L2 cache, beside as many of sums."""
    return 3 * cache_bytes(Path("/sys/devices/system/cpu/cpu0/cache/index2/size")) // 10


def cache_bytes(file: Path) -> int:
    """The size of a cache in a file of Linux's; 2 MiB where there is none."""
    try:
        said = re.fullmatch(r"(\d+)K\s*", file.read_text())
    except OSError:
        said = None
    return int(said[1]) * 2**10 if said else 2**21
