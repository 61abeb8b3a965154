"""Numbers of 16 bits in kernels, whose arrays hold their bits as int16."""

# ruff: noqa: PLW0108 - numba counts the arguments of a lambda

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from modulora_kernels.compiled import jit


@jit(borrows=True)
def from_half(bits):
    """The fp32 number of an fp16 one by its bits, an int16: exact, NaN and infinities too."""
    wide = np.uint32(np.uint16(bits))
    magnitude = np.uint32((wide & 0x7FFF) << 13)
    sign = np.uint32((wide & 0x8000) << 16)
    # the exponents have biases 15 and 127; the product normalizes subnormal numbers too
    scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    special = np.uint32(magnitude | np.uint32(0x7F800000))
    number = special if magnitude >= np.uint32(0x7C00 << 13) else scaled
    return np.uint32(number | sign).view(np.float32)


@jit(borrows=True)
def from_bf16(bits):
    """The fp32 number of a bf16 one by its bits, an int16."""
    return np.uint32(np.uint32(np.uint16(bits)) << 16).view(np.float32)


@jit(borrows=True)
def to_bf16(number):
    """The bits in bf16, int16, of an fp32 number: to nearest even, and one NaN for all."""
    bits = np.float32(number).view(np.uint32)
    nearest = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))
    rounded = nearest if number == number else np.uint32(0x7FC00000)
    return np.int16(rounded >> 16)


def widen(value):
    """Convert ``value`` to fp32: it is fp32 already, or an int16 with the bits of a bf16 number."""
    raise NotImplementedError


@overload(widen, strict=False)
def _widen(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: from_bf16(value)


def narrow(number, like):
    """Convert an fp32 number to the storage of ``like``: fp32, or the bits of bf16 in an int16."""
    raise NotImplementedError


@overload(narrow, strict=False)
def _narrow(number, like):  # noqa: ARG001 - numba matches names
    if isinstance(like, types.Float):
        return lambda number, like: number  # noqa: ARG005
    return lambda number, like: to_bf16(number)  # noqa: ARG005


@jit(borrows=True)
def narrow_row(x, out):
    """Write fp32 numbers to ``out``, which is fp32 or holds the bits of bf16."""
    for k in range(out.size):
        out[k] = narrow(x[k], out[k])


@jit(borrows=True)
def largest_bits(bits):
    """The bits of max |x|, an int32, of the int32 bits of x: NaN is above all numbers.

    The maximum of whole numbers is vectorised. Pass a slice instead of a range: indices from 0 on
    need no check for negative ones.
    """
    largest = np.int32(0)
    for k in range(bits.size):
        largest = max(largest, np.int32(bits[k] & 0x7FFFFFFF))
    return largest
