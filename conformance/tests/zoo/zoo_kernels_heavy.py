"""A package whose metadata can't be read without numba."""

from __future__ import annotations

import numba  # noqa: F401  # the bug
from zoo_kernels.quantizers import Sound


class HeavyPackage(Sound):
    pass
