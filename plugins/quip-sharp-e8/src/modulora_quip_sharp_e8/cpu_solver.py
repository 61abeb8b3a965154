"""BlockLDLQ's inner loop on the CPU, compiled by numba: :mod:`modulora_quip_sharp_e8.reference` a group of columns at a time.

The rows of W are independent of one another, so a thread takes a row through a whole group, where the row's errors and the
group's part of the feedback stay in cache. Nothing is summed across threads: their number doesn't change a bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from modulora_core.kernels import jit
from modulora_quip_sharp_e8.cpu_search import nearest_e8p, nearest_e81, point_e8p, point_e81

_ROWS = 16
"""Rows a thread takes at a time: enough to pay for its scratch, few enough to share the work evenly."""


@jit(borrows=True)
def _round(t: Any, bits: int, scales: Any, p: Any, q: Any) -> tuple[int, int]:
    """Codes of the point nearest to ``t``, and the point in ``p``. ``q`` is scratch. All ``[8]``."""
    code = nearest_e8p(t)
    point_e8p(code, p)
    if bits == 2:
        return code, 0
    for c in range(8):
        t[c] = (t[c] - p[c]) * scales[0]
    if bits == 3:
        residual = nearest_e81(t)
        point_e81(residual, q)
    else:
        residual = nearest_e8p(t)
        point_e8p(residual, q)
    for c in range(8):
        p[c] += q[c] * scales[1]
    return code, residual


@jit(fastmath=("contract",), borrows=True)
def _add_feedback(t: Any, e: Any, P: Any, begin: int, k: int) -> None:
    """``t += e[begin:] P[begin:, k : k + 8]``."""
    for j in range(begin, e.size):
        for c in range(8):
            t[c] += e[j] * P[j, k + c]


@jit(parallel=True)
def group(
    W: Any,
    base: Any,
    P: Any,
    E: Any,
    start: int,
    lower: bool,
    bits: int,
    scales: Any,
    codes: Any,
    residual: Any,
) -> None:
    """Round the blocks of columns ``[start, start + n)`` of W, last one first, and keep their errors E = W − Ŵ.

    ``base`` ``[rows, n]`` is the feedback of the columns outside of the group, ``P`` ``[n, n]`` that of those inside, with
    zero where a block would feed itself. ``lower``: P has blocks below the diagonal only. ``scales`` is what a
    residual is multiplied by before it is rounded, and after.
    """
    rows, n = base.shape
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        t, p, q = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, rows)):
            e = E[o, start : start + n]
            for k in range(n - 8, -1, -8):
                for c in range(8):
                    t[c] = W[o, start + k + c] + base[o, k + c]
                _add_feedback(t, e, P, k + 8 if lower else 0, k)
                first, second = _round(t, bits, scales, p, q)
                block = (start + k) // 8
                codes[o, block] = first
                if bits != 2:
                    residual[o, block] = second
                for c in range(8):
                    e[k + c] = W[o, start + k + c] - p[c]
