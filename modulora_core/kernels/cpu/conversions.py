"""Numbers of 16 bits in kernels that numba compiles, whose arrays hold them as int16: fp16 and bf16 to fp32, fp32 to bf16, and fp32 to
fp16 and back.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.vectors import LANES, assembly, call, has, pointer

_FLOAT, _LANE, _HALF, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
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


@intrinsic
def through_half(_context: Any, _number: Any) -> Any:
    """An fp32 number rounded to fp16 and back: see :func:`through_halves`."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return through_halves(context, builder, arguments[0])

    return types.float32(types.float32), generate


@intrinsic
def from_half(_context: Any, _bits: Any) -> Any:
    """The fp32 number of an fp16 one, whose bits are in an int16: exact, NaN and infinities too."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return halves_to_floats(context, builder, arguments[0])

    return types.float32(types.int16), generate


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


@intrinsic
def widen(_context: Any, value: Any) -> Any:
    """The number that is stored as ``value``: of an int16, the bits of a bf16 number, that as fp32; others are themselves."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return (
            arguments[0] if isinstance(value, types.Float) else bf16_to_float(builder, arguments[0])
        )

    return (value if isinstance(value, types.Float) else types.float32)(value), generate


def bf16_to_float(builder: Any, bits: Any) -> Any:
    """The fp32 number of a bf16 one by its bits, or those of a vector of sixteen, in an intrinsic."""
    lanes, floats = _as_many(bits, _LANE, _FLOAT)
    return builder.bitcast(builder.shl(builder.zext(bits, lanes), _constant(lanes, 16)), floats)


@intrinsic
def narrow(_context: Any, _number: Any, like: Any) -> Any:
    """An fp32 number as ``like`` is stored: rounded to bf16's bits where that is an int16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return arguments[0] if like is types.float32 else float_to_bf16(builder, arguments[0])

    return like(types.float32, like), generate


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


@intrinsic
def _narrow_vectors(_context: Any, w: Any, _index: Any, out: Any) -> Any:
    """Thirty-two values of ``w`` from ``index`` on to ``out``, as it is stored."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, index, out = arguments
        kind, _, out_kind = signature.args
        starts = index, builder.add(index, _INDEX(LANES))
        numbers = [
            builder.load(pointer(context, builder, kind, w, at, _FLOATS), align=4) for at in starts
        ]
        put_numbers(context, builder, out_kind, out, index, numbers)
        return context.get_dummy_value()

    return types.void(w, types.int64, out), generate


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


@jit(borrows=True)
def widen_row(x: Any, out: Any) -> None:
    """The numbers that are stored in ``x``, :func:`widen` of each, to as many of ``out``, fp32."""
    for k in range(out.size):
        out[k] = widen(x[k])


@jit(borrows=True)
def narrow_row(w: Any, out: Any) -> None:
    """fp32 numbers as ``out``, as long, is stored: rounded to bf16's bits for int16, to the nearest and halves to even, as torch does.

    Both are C-contiguous ``[n]``.
    """
    whole = out.size // (2 * LANES) * (2 * LANES)
    for k in range(0, whole, 2 * LANES):
        _narrow_vectors(w, k, out)
    for k in range(whole, out.size):
        out[k] = narrow(w[k], out[k])
