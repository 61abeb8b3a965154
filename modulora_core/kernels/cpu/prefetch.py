"""Packed bytes asked for before they are needed, in kernels that numba compiles.

A processor reads ahead by itself, but within a page of 4 KiB, and it begins anew in each: a kernel that decodes in registers reaches the
next page before its bytes are there, and then waits. So it asks for what it will read :data:`AHEAD` bytes later
(docs/performance-findings.md, One row). Best is a line at a time, while it computes (:func:`ask_for`, in an intrinsic of its own): of many
that are asked for at once the first ones make those behind them wait. :func:`read_ahead` is for where that can't be.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.vectors import call, pointer

AHEAD = 4096
"""How many bytes ahead: what memory delivers within the time that it takes to answer, and a little. 2 to 8 KiB made no difference."""

_LINE = 64
"""Bytes that come at once, on nearly all processors. Where it is more, some are asked for twice, which costs next to nothing."""

_BYTE, _WHOLE, _INDEX = ir.IntType(8), ir.IntType(32), ir.IntType(64)

NEAR, FAR = 3, 2
"""Into all caches, and into all but the L1: for what is read so much later that it would take the place of what is read now."""


def ask_for(builder: Any, place: Any, caches: int) -> None:
    """Have the line at ``place``, a pointer to bytes, fetched, in an intrinsic. It may be anywhere, also where nothing may be read."""
    to_read, data = _WHOLE(0), _WHOLE(1)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, to_read, _WHOLE(caches), data])


@intrinsic
def _ask_for_lines(_context: Any, array: Any, _begin: Any, _stop: Any) -> Any:
    """The lines of bytes ``[begin, stop)`` of an array, none where it is empty. Asking changes nothing that a program can see."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, begin, stop = arguments
        data = pointer(context, builder, signature.args[0], array, _INDEX(0), _BYTE)
        lines = builder.sdiv(
            builder.add(builder.sub(stop, begin), _INDEX(_LINE - 1)), _INDEX(_LINE)
        )
        with cgutils.for_range(builder, lines) as loop:
            at = builder.add(begin, builder.mul(loop.index, _INDEX(_LINE)))
            ask_for(builder, builder.gep(data, [at]), NEAR)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@jit(borrows=True)
def read_ahead(array: Any, first: int, count: int) -> None:
    """Have the processor fetch what a kernel reads after elements ``[first, first + count)`` of a C-contiguous array, as if it were flat.

    A kernel calls it before it reads these: what it asks for are as many bytes, :data:`AHEAD` further on.
    """
    begin = first * array.itemsize + AHEAD
    _ask_for_lines(array, begin, min(begin + count * array.itemsize, array.size * array.itemsize))
