"""Memory for what a kernel decodes, in kernels that numba compiles: on the thread's stack, or taken from the heap.

What a decoder needs for some rows, a few KiB, belongs on the stack: it is the same memory at each call, so it is in the cache, and costs
nothing to take. The heap may have given other memory each time, and a decoder is called for each few rows. What is larger is taken by
:func:`scratch`, once for each thread (:func:`modulora_core.kernels.cpu.shares.share`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import from_dtype, types
from numba.extending import intrinsic
from numba.np import arrayobj

from modulora_core.kernels import jit

_LINE = 64
"""Bytes of a line of the cache, on nearly all processors, and of the widest vector."""

MOST_ON_STACK = 2**16
"""Bytes: a thread of some systems has 512 KiB of stack, or fewer."""


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


def on_stack(count: int, dtype: Any) -> Any:
    """A function for kernels, without arguments, that gives ``count`` uninitialised numbers on the stack of its caller's thread.

    They are a C-contiguous array ``[count]`` that begins with a line of the cache. It is valid until the function that asked for it
    returns, which must not return it, and the same each time that function asks at the same place. Nothing is taken from the heap, so the
    function may be one that borrows (:func:`modulora_core.kernels.jit`).

    Args:
        count: known when a kernel is compiled.
        dtype: numpy's.

    Raises:
        ValueError: it is more than :data:`MOST_ON_STACK` bytes.
    """
    size = np.dtype(dtype).itemsize
    if count * size > MOST_ON_STACK:
        raise ValueError(
            f"on_stack({count}, {np.dtype(dtype)}): expected at most {MOST_ON_STACK} bytes, since a thread's stack may be small, got "
            f"{count * size}; decode fewer columns at once, or take the memory by scratch(), once for each thread"
        )
    array = types.Array(from_dtype(np.dtype(dtype)), 1, "C")

    @intrinsic
    def room(_context: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
            number = context.get_data_type(array.dtype)
            with (
                builder.goto_entry_block()
            ):  # not numba's alloca_once, which writes zeros at each call
                place = builder.alloca(ir.ArrayType(number, count))
            place.align = _LINE
            made = arrayobj.make_array(array)(context, builder)
            length, itemsize = (context.get_constant(types.intp, value) for value in (count, size))
            data = builder.bitcast(place, number.as_pointer())
            arrayobj.populate_array(made, data, [length], [itemsize], itemsize, meminfo=None)
            return made._getvalue()

        return array(), generate

    return room
