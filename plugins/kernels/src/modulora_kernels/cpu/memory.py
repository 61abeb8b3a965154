"""Scratch memory of kernels, and how their threads share rows."""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import from_dtype, types
from numba.extending import intrinsic
from numba.np import arrayobj

from modulora_kernels.compiled import jit
from modulora_kernels.cpu.vectors import prefetch, size_of

_LINE = 64
"""Bytes of a cache line, and of the widest vector."""


@jit()
def signed(index):
    """A signed index: numba adds unsigned and signed numbers as floats."""
    return np.int64(index)


@jit()
def share(index, shares, count, unit=1):
    """The rows ``[begin, stop)`` of share ``index``: whole units, except in the last share."""
    number = signed(index)
    units = (count + unit - 1) // unit
    return number * units // shares * unit, min(count, (number + 1) * units // shares * unit)


@jit()
def scratch(rows, columns, dtype):
    """Uninitialised ``[rows, columns]``, C-contiguous, that begins with a cache line."""
    count = rows * columns
    room = np.empty(count + _LINE, dtype)
    first = -room.ctypes.data % _LINE // room.itemsize
    return room[first : first + count].reshape(rows, columns)


AHEAD = 4096
"""Bytes ahead: the processor reads ahead by itself, but only within a page of 4 KiB."""


@jit(borrows=True)
def read_ahead(array, first, count):
    """Prefetch the bytes :data:`AHEAD` of ``count`` elements from ``first`` on."""
    line, begin = _LINE // size_of(array), first + AHEAD // size_of(array)
    for at in range(begin, min(begin + count, array.size), line):
        prefetch(array, at)


MOST_ON_STACK = 2**16
"""Bytes: a thread of some systems has 512 KiB of stack, or less."""


def on_stack(count, dtype):
    """Make a function for kernels, without arguments, that gives scratch on the thread's stack.

    It gives an uninitialised array ``[count]`` that begins at a cache line, until the caller
    returns. A function that borrows (:func:`modulora_kernels.jit`) may call it.

    Args:
        count: known when a kernel is compiled.
        dtype: numpy's.

    Raises:
        ValueError: more than :data:`MOST_ON_STACK` bytes.
    """
    size = np.dtype(dtype).itemsize
    if count * size > MOST_ON_STACK:
        raise ValueError(
            f"on_stack({count}, {np.dtype(dtype)}): expected at most {MOST_ON_STACK} bytes, "
            f"got {count * size}; decode fewer columns at once, or use scratch()"
        )
    array = types.Array(from_dtype(np.dtype(dtype)), 1, "C")

    @intrinsic
    def room(_context):
        def generate(context, builder, _signature, _arguments):
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
