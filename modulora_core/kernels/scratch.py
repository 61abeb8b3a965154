"""Memory for what a kernel decodes, in kernels that numba compiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from modulora_core.kernels import jit

_LINE = 64
"""Bytes of a line of the cache, on nearly all processors, and of the widest vector."""


@jit()
def scratch(rows: int, columns: int, dtype: Any) -> Any:
    """Uninitialised ``[rows, columns]``, C-contiguous, that begins with a line of the cache.

    numba's own arrays begin anywhere: each vector could be in two lines, and would be so for a process's whole life, since it is given the
    same memory again and again.
    """
    count = rows * columns
    room = np.empty(count + _LINE, dtype)
    first = -room.ctypes.data % _LINE // room.itemsize
    return room[first : first + count].reshape(rows, columns)
