"""Where OPTQ's codes are in their planes (:mod:`modulora_optq.packing`), and codes taken from there, in kernels that numba compiles.

A *place* is where a code is: how many bytes after the beginning of a part of the low bits, and at which bit; and the same of third bits,
which codes of 3 bits have in a plane of their own. *Parts* are the lengths of both planes' parts, in bytes, which are as many codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.ir import LANES, has, pointer, splat
from modulora_optq.packing import PLANES, plane_bytes

_BYTE, _INDEX = ir.IntType(8), ir.IntType(64)
_plane_bytes = register_jitable(plane_bytes)


def looks_up(context: Any, bits: int) -> bool:
    """Whether what codes stand for is looked up in registers, where one instruction does: AVX2's is of eight values."""
    return (bits < 8 and has(context, "avx512f")) or (bits < 4 and has(context, "avx2"))


class Taken:
    """Codes of a row, some at a time, in an intrinsic.

    Args:
        bits: of a code, known when the intrinsic is generated.
        codes: the array, after its numba type.
        row: where the row's codes begin.
        low_part: the length of a part of the low bits.
        place: of the first code.
    """

    def __init__(
        self, context: Any, builder: Any, bits: int, codes: tuple[Any, Any], row: Any, low_part: Any, place: list[Any]
    ) -> None:  # fmt: skip
        self._context, self._builder, self._bits, self._codes = context, builder, bits, codes
        low, self._low_shift, high, self._high_shift = place
        self._low, self._high = builder.add(row, low), builder.add(builder.add(row, low_part), high)

    def indices(self, k: Any, of: ir.VectorType) -> Any:
        """Codes from the k-th on, as many as ``of`` has lanes, in their low bits: above there are others."""
        builder = self._builder
        index = self._shifted(builder.add(self._low, k), self._low_shift, of)
        if self._bits != 3:
            return index
        of_low, two = (ir.Constant(of, [number] * of.count) for number in (3, 2))
        above = self._shifted(builder.add(self._high, k), self._high_shift, of)
        return builder.or_(builder.and_(index, of_low), builder.shl(above, two))

    def codes(self, k: Any, of: ir.VectorType) -> Any:
        """The same without others."""
        return self._builder.and_(
            self.indices(k, of), ir.Constant(of, [2**self._bits - 1] * of.count)
        )

    def _shifted(self, byte: Any, shift: Any, of: ir.VectorType) -> Any:
        """Bytes shifted down."""
        builder = self._builder
        place = pointer(self._context, builder, *self._codes, byte, ir.VectorType(_BYTE, of.count))
        found = builder.load(place, align=1)
        found = found if of.element == _BYTE else builder.zext(found, of)
        return builder.lshr(found, splat(builder, builder.trunc(shift, of.element), of))


@jit(borrows=True)
def _low_width(bits: int) -> int:
    """How many bits of a code are in the plane of low ones."""
    return 2 if bits == 3 else bits


@jit(borrows=True)
def code_at(codes: Any, row: int, low_part: int, place: Any, k: int, bits: int) -> Any:
    """The k-th code from a place on, in the same part."""
    low, low_shift, high, high_shift = place
    code = (np.int64(codes[row + low + k]) >> low_shift) & ((1 << _low_width(bits)) - 1)
    if bits == 3:
        code |= ((np.int64(codes[row + low_part + high + k]) >> high_shift) & 1) << 2
    return np.uint8(code)


@jit(borrows=True)
def parts_of(n: int, bits: int) -> Any:
    """How long a part is of the low bits of ``n`` codes, and of third ones, where there are none as long as the other."""
    low_part = _plane_bytes(n, _low_width(bits))
    return low_part, _plane_bytes(n, 1) if bits == 3 else low_part


@jit(borrows=True)
def _part(column: int, length: int) -> int:
    """In which part of so many codes it is, counted instead of divided: there are eight at most."""
    index = 0
    while (index + 1) * length <= column:
        index += 1
    return index


@jit(borrows=True)
def place_of(column: int, parts: Any, bits: int) -> Any:
    """Of the code of a column."""
    low, high = _part(column, parts[0]), _part(column, parts[1])
    return column - low * parts[0], low * _low_width(bits), column - high * parts[1], high


@jit(borrows=True)
def moved(place: Any, count: int, parts: Any, bits: int) -> Any:
    """The place so many codes on, which is in the same parts, or where the next ones begin."""
    low, low_shift, high, high_shift = place
    low, high = low + count, high + count
    if low == parts[0]:
        low, low_shift = 0, low_shift + _low_width(bits)
    if high == parts[1]:
        high, high_shift = 0, high_shift + 1
    return low, low_shift, high, high_shift


@jit(borrows=True)
def left_of(place: Any, parts: Any) -> Any:
    """How many codes there are, from a place on, before a part ends."""
    return min(parts[0] - place[0], parts[1] - place[2])


@intrinsic
def _unpack_vector(
    _context: Any, packed: Any, _row: Any, _low_part: Any, place: Any, _k: Any, _bits: Any, out: Any, _to: Any
) -> Any:  # fmt: skip
    """Sixteen codes, from the k-th after a place, to ``out[to:]``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, row, low_part, place, k, bits, out, to = arguments
        kinds, of, here = (
            signature.args,
            ir.VectorType(_BYTE, LANES),
            cgutils.unpack_tuple(builder, place, 4),
        )
        target = pointer(context, builder, kinds[6], out, to, of)
        for width in PLANES:
            with builder.if_then(builder.icmp_signed("==", bits, _INDEX(width))):
                taken = Taken(context, builder, width, (kinds[0], packed), row, low_part, here)
                builder.store(taken.codes(k, of), target, align=1)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(packed, i64, i64, place, i64, i64, out, i64), generate


@jit(borrows=True)
def unpack(packed: Any, row: int, bits: int, parts: Any, place: Any, count: int, out: Any) -> None:
    """``count`` codes from a place on, of the row that begins at ``packed[row]``, to ``out``, of which up to 15 more are overwritten."""
    k = 0
    while k < count:
        take, j = min(count - k, left_of(place, parts)), 0
        furthest = row + (parts[0] + place[2] if bits == 3 else place[0])
        while j < take:
            if (
                furthest + j + LANES > packed.size
            ):  # beyond the row is fine, and beyond the end isn't
                out[k + j] = code_at(packed, row, parts[0], place, j, bits)
                j += 1
                continue
            _unpack_vector(packed, row, parts[0], place, j, bits, out, k + j)
            j += LANES
        place, k = moved(place, take, parts, bits), k + take
