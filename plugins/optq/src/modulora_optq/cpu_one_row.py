"""The product of one row with OPTQ's packed weights on the CPU: what decoding a token asks for, layer after layer.

    y[o] = Σ_k (code[o, k] − zero[o, g]) scale[o, g] x[k]                                    g = k // group
         = Σ_g scale[o, g] (Σ_{k in g} (code[o, k] − middle) x[k] − (zero[o, g] − middle) Σ_{k in g} x[k])

Codes are counted from the middle one, 2^(bits − 1), so that the second term is small, and none for a symmetric weight. The sums of x are
the same for all rows, so of each group only one number is left of the zeros.

Of sixteen rows scales and zeros are taken first, sixteen groups at a time (:mod:`modulora_optq.cpu_row_scales`). Then each row's codes are
multiplied in registers, in steps of a group or a part of one (:mod:`modulora_optq.cpu_row_product`): nothing decoded is stored.

What it moves and does, for a weight of out · in values: out · in · bits / 8 bytes are read once; three operations for each sixteen
values, five at 3 bits, one more for each part of a step, and about one for each group. The floor is the larger of bytes / bandwidth and
operations / peak.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import share
from modulora_core.kernels.cpu.ir import LANES
from modulora_optq.cpu_row_product import parts_of_byte, rows_product
from modulora_optq.cpu_row_scales import chunks_of, sum_of_vectors, take_row

_ROWS = 16  # whose scales a thread takes at once
_STEPS = (4, 2, 1)  # vectors of a step, best first


def takes(weight: tuple[Any, ...]) -> bool:
    """Whether :func:`matmul_one` can multiply: no part of a row, and no group, ends inside of sixteen columns."""
    bits, group, columns = weight[3:]
    return _is_whole(bits, group, columns, LANES)


@cache  # a layer asks for it each token
def _is_whole(bits: int, group: int, columns: int, step: int) -> bool:
    """Whether parts and groups are whole steps of so many columns."""
    return columns % (step * parts_of_byte(bits)) == 0 and (group % step == 0 or group >= columns)


class _Plan(NamedTuple):
    """What is the same for all weights of a form.

    Attributes:
        kernel: for its bits and the length of its steps.
        group_of: int32 ``[steps, parts]``: of each step in which group each part is.
        chunks: where a row's scales and zeros are (:func:`modulora_optq.cpu_row_scales.chunks_of`).
    """

    kernel: Any
    group_of: NDArray[np.int32]
    chunks: NDArray[np.int32]


@cache
def _plan(bits: int, group: int, columns: int) -> _Plan:
    """For a weight of so many columns, ``group`` of which share a scale, that :func:`takes` lets through."""
    vectors = next(n for n in _STEPS if _is_whole(bits, group, columns, n * LANES))
    parts, step = parts_of_byte(bits), vectors * LANES
    part = columns // parts
    starts = np.arange(0, part, step)[:, None] + part * np.arange(parts)
    groups = -(-columns // group)
    return _Plan(
        _kernel(bits, vectors), (starts // group).astype(np.int32), chunks_of(bits, groups)
    )


def matmul_one(weight: tuple[Any, ...], threads: int, x: Any, y: Any) -> None:
    """``y = x Ŵᵀ`` for one row, fp32 ``[1, in]`` and ``[1, out]``; ``weight`` as in :func:`modulora_optq.cpu_decode.decode`."""
    codes, scales, zeros, bits, group, columns = weight
    plan = _plan(bits, group, columns)
    plan.kernel(codes, scales, zeros, group, plan.group_of, plan.chunks, threads, x, y)


def _product(*_: Any) -> Any:
    """Stands in :func:`_template` for what :func:`modulora_optq.cpu_row_product.rows_product` gives."""
    raise NotImplementedError


def _take(*_: Any) -> Any:
    """Stands in :func:`_template` for what :func:`modulora_optq.cpu_row_scales.take_row` gives."""
    raise NotImplementedError


def _template(
    codes: Any,
    scales: Any,
    zeros: Any,
    group: int,
    group_of: Any,
    chunks: Any,
    threads: int,
    x: Any,
    y: Any,
) -> None:
    """:func:`matmul_one`, with what a :class:`_Plan` has."""
    rows, groups = scales.shape
    row_bytes, row_zeros = codes.size // max(1, rows), zeros.size // max(1, rows)
    part = x.size // group_of.shape[1]
    flat = scales.reshape(scales.size)
    sums_of_x = np.zeros(groups + LANES, np.float32)
    for g in range(groups):
        sums_of_x[g] = sum_of_vectors(x, g * group, min(group, x.size - g * group))
    for index in prange(threads):
        start, stop = share(index, threads, rows, _ROWS)
        taken, sums = (
            np.empty((_ROWS, groups + LANES), np.float32),
            np.empty((_ROWS, LANES), np.float32),
        )
        for begin in range(start, stop, _ROWS):
            end = min(begin + _ROWS, stop)
            is_followed = end * groups + LANES <= flat.size
            is_followed &= not zeros.size or end * row_zeros + LANES <= zeros.size
            if is_followed:  # sixteen are read at once, also behind the last row's
                for o in range(begin, end):
                    _take(
                        flat,
                        o * groups,
                        zeros,
                        o * row_zeros,
                        chunks,
                        sums_of_x,
                        taken,
                        sums,
                        o - begin,
                    )
            else:
                last_scales = _and_more(flat, begin * groups, end * groups)
                last_zeros = _and_more(zeros, begin * row_zeros, end * row_zeros)
                for r in range(end - begin):
                    _take(
                        last_scales,
                        r * groups,
                        last_zeros,
                        r * row_zeros,
                        chunks,
                        sums_of_x,
                        taken,
                        sums,
                        r,
                    )
            _product(
                codes,
                begin * row_bytes,
                row_bytes,
                end - begin,
                part,
                x,
                group_of,
                taken,
                sums,
                y,
                begin,
            )


@jit()
def _and_more(array: Any, start: int, stop: int) -> Any:
    """A copy of ``array[start:stop]`` with sixteen elements more, which are of no meaning; of an empty array one that is."""
    copy = np.zeros(stop - start + LANES if array.size else 0, array.dtype)
    copy[: stop - start] = array[start:stop]
    return copy


@cache
def _kernel(bits: int, vectors: int) -> Any:
    """:func:`_template` with the product for so many bits and steps of so many vectors, compiled at its first call and kept by its name."""
    names = _template.__globals__ | {
        "_product": rows_product(bits, vectors),
        "_take": take_row(bits),
    }
    function = FunctionType(_template.__code__, names, f"matmul_one_{bits}_{vectors}")
    function.__module__, function.__qualname__ = __name__, function.__name__
    return jit(parallel=True)(function)
