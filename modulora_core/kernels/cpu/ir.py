"""Tools for kernels in LLVM's own language. New kernels are loops over vectors (:mod:`modulora_core.kernels.cpu.vectors`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils

LANES = 16
"""Values that are multiplied at once; the processor's registers may be half or a quarter of that."""

_FLOAT, _LANE, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def has(context: Any, feature: str) -> bool:
    """Whether code is generated for a processor with ``feature``, in LLVM's words, such as ``"avx2"``."""
    return f"+{feature}" in str(context.codegen().magic_tuple()[2])


def matrix(context: Any, builder: Any, kind: Any, array: Any) -> tuple[Any, Any]:
    """Where a C-contiguous array begins, and the length of its last dimension."""
    made = context.make_array(kind)(context, builder, array)
    return made.data, cgutils.unpack_tuple(builder, made.shape, kind.ndim)[-1]


def pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, of: ir.Type) -> Any:
    """To ``array[index]``, of a C-contiguous array as if it were flat, as a pointer to ``of``."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), of.as_pointer())


def splat(builder: Any, value: Any, of: ir.VectorType) -> Any:
    """A vector whose lanes are all ``value``."""
    one = builder.insert_element(ir.Constant(of, ir.Undefined), value, _LANE(0))
    return chosen(builder, one, [0] * of.count)


def lookup(context: Any, builder: Any, table: Any, index: Any) -> Any:
    """``table[index & 15]``, a lane at a time: ``<16 x float>`` by ``<16 x i32>``.

    LLVM doesn't find the lookup in registers by itself, so it is spelled for AVX-512 and AVX2. Elsewhere each lane loads its value.
    """
    if has(context, "avx512f"):
        return call(builder, "llvm.x86.avx512.permvar.sf.512", table.type, [table, index])
    if has(context, "avx2"):
        return _lookup_by_eights(builder, table, index)
    if isinstance(table, ir.Constant):
        place = cgutils.global_constant(builder, "table", table)
    else:
        place = cgutils.alloca_once(builder, table.type)
        builder.store(table, place)
    values = builder.bitcast(place, _FLOAT.as_pointer())
    found = ir.Constant(_VECTOR, ir.Undefined)
    for lane in range(LANES):
        at = builder.and_(builder.extract_element(index, _LANE(lane)), _LANE(LANES - 1))
        found = builder.insert_element(found, builder.load(builder.gep(values, [at])), _LANE(lane))
    return found


def chosen(builder: Any, vector: Any, lanes: Iterable[int]) -> Any:
    """A vector of these lanes of one."""
    numbers = list(lanes)
    mask = ir.Constant(ir.VectorType(_LANE, len(numbers)), numbers)
    return builder.shuffle_vector(vector, vector, mask)


def _lookup_by_eights(builder: Any, table: Any, index: Any) -> Any:
    """By AVX2's, which is of eight values by the low three bits: two of them, and a choice by the fourth, which is made a sign for it."""
    tables = [chosen(builder, table, range(first, first + 8)) for first in (0, 8)]
    found = []
    for first in (0, 8):
        eight = chosen(builder, index, range(first, first + 8))
        low, high = (call(builder, "llvm.x86.avx2.permps", of.type, [of, eight]) for of in tables)
        fourth = builder.shl(eight, ir.Constant(eight.type, [28] * eight.type.count))
        choice = [low, high, builder.bitcast(fourth, low.type)]
        found.append(call(builder, "llvm.x86.avx.blendv.ps.256", low.type, choice))
    return builder.shuffle_vector(
        *found, ir.Constant(ir.VectorType(_LANE, LANES), list(range(LANES)))
    )


def call(builder: Any, name: str, of: ir.Type, operands: list[Any]) -> Any:
    """What one of LLVM's functions gives, most of which are an instruction of the processor."""
    kind = ir.FunctionType(of, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def assembly(builder: Any, code: str, of: ir.Type, operands: list[Any], constraints: str) -> Any:
    """What an instruction of the processor gives, by its name: LLVM's names for new ones differ between its versions."""
    kind = ir.FunctionType(of, [operand.type for operand in operands])
    return builder.asm(kind, code, constraints, operands, False)


def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> None:
    """``total += a · b`` for an alloca, which LLVM makes a register; rounded once where the processor can."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


def zeros(builder: Any, count: int, lanes: int = LANES, number: ir.Type = _FLOAT) -> list[Any]:
    """So many sums of sixteen lanes each, or fewer, as allocas, set to 0 where this stands."""
    of = ir.VectorType(number, lanes)
    totals = [cgutils.alloca_once(builder, of) for _ in range(count)]
    for total in totals:  # an alloca is made where the function begins, and this may be in a loop
        builder.store(ir.Constant(of, [0.0] * lanes), total)
    return totals


def sum_of_lanes(builder: Any, value: Any) -> Any:
    """Of sixteen or another power of two, by halves: in one order on every processor."""
    width = value.type.count // 2
    while width:
        low, high = (chosen(builder, value, range(first, first + width)) for first in (0, width))
        value = builder.fadd(low, high)
        width //= 2
    return builder.extract_element(value, _LANE(0))


def loops(builder: Any, count: Any, most: int) -> Iterator[tuple[int, Any]]:
    """A loop over ``most`` at a time of ``count``, and one over the rest: how many at a time, and the first of them."""
    done = _INDEX(0)
    for width in sorted({most, 1}, reverse=True):
        times = builder.sdiv(builder.sub(count, done), _INDEX(width))
        with cgutils.for_range(builder, times) as loop:
            yield width, builder.add(done, builder.mul(loop.index, _INDEX(width)))
        done = builder.add(done, builder.mul(times, _INDEX(width)))


_HALF = ir.IntType(16)
_FLOATS, _HALVES = ir.VectorType(_FLOAT, LANES), ir.VectorType(_HALF, LANES)


def _as_many(values: Any, *kinds: ir.Type) -> list[ir.Type]:
    """Types of one value each, or of a vector of as many, as ``values`` are."""
    is_vector = isinstance(values.type, ir.VectorType)
    return [ir.VectorType(kind, values.type.count) if is_vector else kind for kind in kinds]


def _constant(of: ir.Type, value: float) -> Any:
    return ir.Constant(of, [value] * of.count if isinstance(of, ir.VectorType) else value)


def _has_halves(context: Any) -> bool:
    """Whether the processor converts to fp16 and back. LLVM's own conversion calls a library elsewhere, and numba doesn't link that."""
    return has(context, "f16c") or has(context, "avx512f")


def halves_to_floats(context: Any, builder: Any, bits: Any) -> Any:
    """The same of an i16 or of a vector of sixteen, in an intrinsic."""
    lanes, floats, half = _as_many(bits, _LANE, _FLOAT, ir.HalfType())
    if _has_halves(context):
        return builder.fpext(builder.bitcast(bits, half), floats)
    wide = builder.zext(bits, lanes)
    sign = builder.shl(builder.and_(wide, _constant(lanes, 0x8000)), _constant(lanes, 16))
    magnitude = builder.shl(builder.and_(wide, _constant(lanes, 0x7FFF)), _constant(lanes, 13))
    # the exponent counts from 15 in one and from 127 in the other; a product brings subnormals in order too
    scaled = builder.fmul(builder.bitcast(magnitude, floats), _constant(floats, 2.0**112))
    special = builder.or_(magnitude, _constant(lanes, 0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, _constant(lanes, 0x7C00 << 13))
    value = builder.select(is_special, special, builder.bitcast(scaled, lanes))
    return builder.bitcast(builder.or_(value, sign), floats)


def through_halves(context: Any, builder: Any, numbers: Any) -> Any:
    """fp32 numbers rounded to fp16, to the nearest and halves to even, and back: of less than 65520, one or a vector of sixteen, in an
    intrinsic.
    """
    lanes, floats, half = _as_many(numbers, _LANE, _FLOAT, ir.HalfType())
    if _has_halves(context):
        return builder.fpext(builder.fptrunc(numbers, half), floats)
    bits = builder.bitcast(numbers, lanes)
    is_odd = builder.and_(builder.lshr(bits, _constant(lanes, 13)), _constant(lanes, 1))
    rounded = builder.add(bits, builder.add(is_odd, _constant(lanes, 0xFFF)))
    normal = builder.bitcast(builder.and_(rounded, _constant(lanes, ~0x1FFF)), floats)
    # below 2⁻¹⁴ steps are 2⁻²⁴, as those of fp32 are between 0.5 and 1
    steps = _constant(floats, 0.75)
    small = builder.fsub(builder.fadd(numbers, steps), steps)
    magnitude = builder.and_(bits, _constant(lanes, 0x7FFFFFFF))
    is_small = builder.icmp_unsigned("<", magnitude, _constant(lanes, (127 - 14) << 23))
    return builder.select(is_small, small, normal)


def bf16_to_float(builder: Any, bits: Any) -> Any:
    """The fp32 number of a bf16 one by its bits, or those of a vector of sixteen, in an intrinsic."""
    lanes, floats = _as_many(bits, _LANE, _FLOAT)
    return builder.bitcast(builder.shl(builder.zext(bits, lanes), _constant(lanes, 16)), floats)


def float_to_bf16(builder: Any, numbers: Any) -> Any:
    """The bits in bf16 of an fp32 number, or of a vector of them, in an intrinsic: to the nearest, halves to even, and one NaN for all,
    as torch does.
    """
    of, stored = _as_many(numbers, _LANE, _HALF)
    bits = builder.bitcast(numbers, of)
    is_odd = builder.and_(builder.lshr(bits, _constant(of, 16)), _constant(of, 1))
    rounded = builder.lshr(
        builder.add(bits, builder.add(is_odd, _constant(of, 0x7FFF))), _constant(of, 16)
    )
    magnitude = builder.and_(bits, _constant(of, 0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, _constant(of, 0x7F800000))
    return builder.trunc(builder.select(is_nan, _constant(of, 0x7FC0), rounded), stored)


def put_numbers(
    context: Any, builder: Any, kind: Any, out: Any, index: Any, numbers: list[Any]
) -> None:
    """Vectors of sixteen fp32 numbers, one after another, to ``out[index:]``, flat, as it is stored: see :func:`narrow`, in an intrinsic.

    Two at a time AVX-512 rounds by one instruction, which takes subnormal numbers for 0 and keeps a NaN's other bits: where a lane is of
    these, all are rounded the long way.
    """
    places = [builder.add(index, _INDEX(k * LANES)) for k in range(len(numbers))]

    def store(values: list[Any], first: int) -> None:
        for at, value in zip(places[first:], values, strict=False):
            builder.store(value, pointer(context, builder, kind, out, at, value.type), align=2)

    for first in range(0, len(numbers), 2):
        two = numbers[first : first + 2]
        if kind.dtype is types.float32:
            store(two, first)
        elif len(two) == 2 and has(context, "avx512bf16") and has(context, "avx512dq"):
            of = ir.VectorType(_HALF, 2 * LANES)
            store([assembly(builder, "vcvtne2ps2bf16 $2, $1, $0", of, two[::-1], "=v,v,v")], first)
            is_special = builder.or_(*(_is_special(builder, value) for value in two))
            with builder.if_then(is_special, likely=False):
                store([float_to_bf16(builder, value) for value in two], first)
        else:
            store([float_to_bf16(builder, value) for value in two], first)


def _is_special(builder: Any, numbers: Any) -> Any:
    """Whether one of the lanes is a NaN or subnormal, by AVX-512's instruction that sorts numbers into classes."""
    quiet_nan, subnormal, signalling_nan = 0x01, 0x20, 0x80
    bits, classes = (
        ir.VectorType(ir.IntType(1), LANES),
        _LANE(quiet_nan | subnormal | signalling_nan),
    )
    found = call(builder, "llvm.x86.avx512.fpclass.ps.512", bits, [numbers, classes])
    return builder.icmp_unsigned("!=", builder.bitcast(found, _HALF), _HALF(0))


AHEAD = 4096
"""How many bytes ahead: what memory delivers within the time that it takes to answer, and a little. 2 to 8 KiB made no difference."""


_WHOLE = ir.IntType(32)

NEAR, FAR = 3, 2
"""Into all caches, and into all but the L1: for what is read so much later that it would take the place of what is read now."""


def ask_for(builder: Any, place: Any, caches: int) -> None:
    """Have the line at ``place``, a pointer to bytes, fetched, in an intrinsic. It may be anywhere, also where nothing may be read."""
    to_read, data = _WHOLE(0), _WHOLE(1)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, to_read, _WHOLE(caches), data])


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
