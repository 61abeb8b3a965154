"""For how many rows a product on the CPU is made of blocks of sums (:mod:`modulora_core.kernels.cpu.block_templates`), and how much of the
weight it decodes at once. Doesn't import numba.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

from modulora_core.devices.dense_products import float32_precision
from modulora_core.kernels.cpu.bf16_choice import ROWS_BEFORE_AMX

LEAST_ROWS = 32
"""Rows of X from which on blocks of sums are about as fast as other sums, or faster: a whole panel of them."""

MOST_ROWS = 512
"""Rows of X for which sums stay in the cache. Of more, a tile is worth its way to memory."""

LARGE = 2**20
"""Numbers of a weight whose tile, 4 MiB, leaves the L2 cache. Of a smaller one a tile is faster from half as many rows on."""

LEAST_ROWS_OF_SLICES = {1: ROWS_BEFORE_AMX + 1, 2: 32, 3: 64}
"""The same where AMX multiplies (:mod:`modulora_core.kernels.cpu.amx`): of bf16, and of fp32 in two or three slices."""

LEAST_FOR_AMX = 2**18
"""Numbers of a weight from which on AMX is worth taking X apart."""


def slices() -> int:
    """Into how many bf16 numbers AMX takes one of fp32 apart: three, with which products are as exact as in fp32, unless
    ``torch.set_float32_matmul_precision`` asks for less than ``"highest"``.
    """
    return 3 if float32_precision() == "highest" else 2


def most_rows(shape: tuple[int, int]) -> int:
    """Rows of X up to which blocks of sums are faster than tiles of a weight of this shape."""
    return MOST_ROWS if math.prod(shape) >= LARGE else MOST_ROWS // 2


@cache
def decoded_bytes() -> int:
    """How many bytes of Ŵ a thread decodes at once at most: three tenths of its L2 cache, since its sums are about as many."""
    return 3 * cache_bytes(Path("/sys/devices/system/cpu/cpu0/cache/index2/size")) // 10


def cache_bytes(file: Path) -> int:
    """What Linux says in ``file`` of a cache's size; where it says nothing, 2 MiB, for which blocks are as large as they get.

    torch tells that too, but only in versions after the first that we take.
    """
    try:
        said = re.fullmatch(r"(\d+)K\s*", file.read_text())
    except OSError:
        said = None
    return int(said[1]) * 2**10 if said else 2**21
