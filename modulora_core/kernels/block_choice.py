"""For how many rows a product on the CPU is made of blocks of sums (:mod:`modulora_core.kernels.block_templates`). Doesn't import numba."""

from __future__ import annotations

import math

LEAST_ROWS = 32
"""Rows of X from which on blocks of sums are about as fast as other sums, or faster: a whole panel of them."""

MOST_ROWS = 512
"""Rows of X for which sums stay in the cache. Of more, a tile is worth its way to memory."""

LARGE = 2**20
"""Numbers of a weight whose tile, 4 MiB, leaves the L2 cache. Of a smaller one a tile is faster from half as many rows on."""


def most_rows(shape: tuple[int, int]) -> int:
    """Rows of X up to which blocks of sums are faster than tiles of a weight of this shape."""
    return MOST_ROWS if math.prod(shape) >= LARGE else MOST_ROWS // 2
