"""How a kernel's threads share its rows, in kernels that numba compiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from modulora_core.kernels import jit


@jit()
def signed(index: Any) -> Any:
    """That of a ``prange`` is unsigned, and numba takes the sum of an unsigned and a signed number for a float."""
    return np.int64(index)


@jit()
def share(index: Any, shares: int, count: int, unit: int = 1) -> Any:
    """Where share number ``index`` of so many begins and stops: ``count`` rows in whole ``unit`` s, but for the last one.

    Shares are as equal as units allow; some are empty where there are fewer units. ``index`` may be a ``prange``'s.
    A kernel that needs memory of its own gives each thread one share, so that it takes memory once.
    """
    number = signed(index)
    units = (count + unit - 1) // unit
    return number * units // shares * unit, min(count, (number + 1) * units // shares * unit)
