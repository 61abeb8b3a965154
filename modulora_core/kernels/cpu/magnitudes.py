"""The largest magnitude of some fp32 numbers, which a block-wise quantizer divides by."""

from __future__ import annotations

from typing import Any

import numpy as np

from modulora_core.kernels import jit


@jit(borrows=True)
def largest_bits(bits: Any) -> Any:
    """The bits of max |x|, an int32, of the int32 bits of x. The maximum of integers is vectorised, and NaN is above all numbers there.

    ``bits`` is a slice of its own, from 0 on: LLVM can't rule out that other indices are negative.
    """
    largest = np.int32(0)
    for k in range(bits.size):
        largest = max(largest, np.int32(bits[k] & 0x7FFFFFFF))
    return largest
