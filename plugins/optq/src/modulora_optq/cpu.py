"""OPTQ's packed weights on the CPU, compiled by numba: tiles and few-row products.

Columns are as they are stored, or put in the weight's own order. Arrays are as :mod:`modulora_optq.cpu_decode` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import share
from modulora_core.kernels.cpu.cpu_kernels import RowKernels
from modulora_core.kernels.cpu.ir import pointer
from modulora_optq.cpu_decode import decode
from modulora_optq.cpu_one_row import matmul_one, takes

_FOUR = ir.VectorType(ir.FloatType(), 4)

rows = RowKernels(decode, matmul_one, takes, rounds=True)
"""Tiles and few-row products, with the columns as they are stored."""


def _mix(builder: Any, x: Any, y: Any, lanes: tuple[int, ...]) -> Any:
    """The ``lanes`` of x followed by y."""
    return builder.shuffle_vector(
        x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    )


@intrinsic
def _transpose_four(
    _context: Any, values: Any, a: Any, b: Any, c: Any, d: Any, out: Any, to: Any, step: Any
) -> Any:
    """Four values each from ``a``, ``b``, ``c``, ``d`` on; of them, value i is to be at ``to + i · step`` on, side by side."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, *starts, out, to, step = arguments
        kinds = signature.args
        a, b, c, d = (
            builder.load(pointer(context, builder, kinds[0], values, at, _FOUR), align=4)
            for at in starts
        )
        for half in (0, 2):
            ab = _mix(builder, a, b, (half, half + 4, half + 1, half + 5))
            cd = _mix(builder, c, d, (half, half + 4, half + 1, half + 5))
            for lane in (0, 2):
                four = _mix(builder, ab, cd, (lane, lane + 1, lane + 4, lane + 5))
                builder.store(four, pointer(context, builder, kinds[5], out, to, _FOUR), align=4)
                to = builder.add(to, step)
        return context.get_dummy_value()

    return types.void(values, a, b, c, d, out, to, step), generate


@jit(borrows=True)
def _reorder(w: Any, order: Any, columns: Any, out: Any) -> None:
    """``out[:, k] = w[:, order[k]]`` for one to four rows; ``columns`` is scratch of four rows.

    A gather costs by the load, not by the byte: four rows are put side by side, and a load takes four values of a column.
    """
    rows, n = out.shape
    if rows < 4:
        for r in range(rows):
            for k in range(n):
                out[r, k] = w[r, order[k]]
        return
    whole, source, target = n // 4 * 4, w.reshape(w.size), out.reshape(out.size)
    for k in range(0, whole, 4):
        _transpose_four(source, k, n + k, 2 * n + k, 3 * n + k, columns, 4 * k, 4)
    for k in range(whole, n):
        for r in range(4):
            columns[4 * k + r] = w[r, k]
    for k in range(0, whole, 4):
        a, b, c, d = 4 * order[k], 4 * order[k + 1], 4 * order[k + 2], 4 * order[k + 3]
        _transpose_four(columns, a, b, c, d, target, k, n)
    for k in range(whole, n):
        for r in range(4):
            out[r, k] = columns[4 * order[k] + r]


@jit(parallel=True)
def dequantize_permuted(weight: Any, threads: int, first: int, order: Any, out: Any) -> None:
    """Rows ``first ...`` to all of ``out``, fp32 ``[rows, in]``: column k of it is stored column ``order[k]``, which must be in bounds."""
    count, n = out.shape
    for index in prange(threads):
        begin, stop = share(index, threads, count, 4)
        w, columns = np.empty((4, n), np.float32), np.empty(4 * n, np.float32)
        for o in range(begin, stop, 4):
            four = out[o : min(o + 4, stop)]
            decode(weight, first + o, 0, n, w[: len(four)])
            _reorder(w, order, columns, four)
