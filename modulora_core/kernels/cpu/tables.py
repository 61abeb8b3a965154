"""Sixteen numbers that are looked up in registers and written as an array is stored, in kernels that numba compiles.

What shares a scale, and has codes of up to four bits, has sixteen values. So a decoder computes them once for all of it, and rounds them
once where it writes bf16; then each code is one lookup, of sixteen codes at once, or of 32 of bf16, instead of a conversion, products and
a rounding.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types

from modulora_core.kernels.cpu.conversions import float_to_bf16, put_numbers
from modulora_core.kernels.cpu.vectors import LANES, call, chosen, has, lookup, pointer


class Table:
    """A table for an array of the numba type ``kind``, fp32, or int16 for bf16's bits, in an intrinsic.

    Args:
        numbers: ``<16 x float>``.

    Attributes:
        index: the type of a lane of what :meth:`put` is given: i16 where numbers of 16 bits are looked up, else i32.
        at_once: how many vectors of sixteen it takes then: two or one.
    """

    def __init__(self, context: Any, builder: Any, kind: Any, numbers: Any) -> None:
        self._context, self._builder, self._kind, self._numbers = context, builder, kind, numbers
        is_of_halves = kind.dtype is types.int16 and has(context, "avx512bw")
        self.index, self.at_once = ir.IntType(16 if is_of_halves else 32), 2 if is_of_halves else 1
        if is_of_halves:
            # twice, so that the fifth bit of an index, which this lookup has, may be anything
            self._numbers = chosen(builder, float_to_bf16(builder, numbers), 2 * list(range(LANES)))

    def put(self, out: Any, at: Any, index: Any) -> None:
        """``out[at + k] = numbers[index[k] & 15]``, flat, for all lanes of ``index``: sixteen, or 32 where two vectors are taken."""
        builder, count = self._builder, index.type.count
        if self.at_once == 1:
            found = lookup(self._context, builder, self._numbers, index)
            put_numbers(self._context, builder, self._kind, out, at, [found])
            return
        of = self._numbers.type
        wide = chosen(
            builder, index, [lane % count for lane in range(of.count)]
        )  # sixteen are looked up twice
        found = call(builder, "llvm.x86.avx512.permvar.hi.512", of, [self._numbers, wide])
        found = chosen(builder, found, range(count))
        place = pointer(self._context, builder, self._kind, out, at, found.type)
        builder.store(found, place, align=2)
