"""Decodes walks to C on a CPU, sixteen weights at a time, for numba's kernels.

A pair of vectors has 32 weights: all inputs of the columns p and p + 8 of a tile. K words of 32
bits hold their new bits, and the word before has the rest of the first states. A state is 16 bits
or less of two neighbouring words, shifted together. Its place depends on K and on the lane alone.
So a vector is two permutations of words, a shift and the code function.

The words of a tile are copied beside the last one, which is also before the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core.registry import cpu_target

from modulora_core.kernels.cpu import (
    LANES,
    jit,
    load,
    lookup,
    operation,
    prefetch,
    splat,
)
from modulora_qtip import codes
from modulora_qtip.trellis import TILE

_AHEAD = 8  # tiles that are loaded into the cache before they are read

_I64, _INT, _FLOAT = types.int64, ir.IntType(32), ir.FloatType()
_WHOLES, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_EIGHT = ir.VectorType(_FLOAT, 8)

SUMS_BYTES = "+avx512vnni" in str(cpu_target.target_context.codegen().magic_tuple()[2])
"""Whether the processor adds up the bytes of a number in one instruction."""


def _geometry() -> tuple[Any, Any]:
    """By K: words before and at the end of a state, counted from the word before a pair's; shifts.

    Both int32, ``[K, half of the pair, ...]`` flat, as the kernels read them.
    """
    words, shifts = [], []
    for K in range(9):
        last = (np.arange(2 * LANES) + 1) * K - 1  # the last bit of a state, from the pair's first
        at = np.maximum(last, 0) // 32
        words += [at[:LANES], at[:LANES] + 1, at[LANES:], at[LANES:] + 1]
        shifts += [31 - last[:LANES] % 32, 31 - last[LANES:] % 32]
    return np.concatenate(words).astype(np.int32), np.concatenate(shifts).astype(np.int32)


_WORDS, _SHIFTS = _geometry()


def _all(of: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(of, [value] * of.count)


def _call(builder: Any, name: str, of: ir.Type, operands: list[Any]) -> Any:
    kind = ir.FunctionType(of, [operand.type for operand in operands])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, operands)


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any, of: ir.Type) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), of.as_pointer())


@operation(lambda source, _at, words, _to: types.void(source, _I64, words, _I64))
def _move(
    context: Any, builder: Any, kinds: Any, source: Any, at: Any, words: Any, to: Any
) -> None:
    """``(source, at, words, to)``: eight words of 32 bits from ``source[at]`` on, int16."""
    eight = builder.load(_place(context, builder, kinds[0], source, at, _EIGHT), align=2)
    builder.store(eight, _place(context, builder, kinds[2], words, to, _EIGHT), align=4)


@operation(
    lambda before, at, shift, mask, multiplier, addend, _kind: before(
        before, at, shift, mask, multiplier, addend, _kind
    )
)
def _values(
    _context: Any, builder: Any, kinds: Any, before: Any, at: Any, shift: Any, mask: Any,
    multiplier: Any, addend: Any, _kind: Any,
) -> Any:  # fmt: skip
    """``(before, at, shift, mask, multiplier, addend, kind)``: the values of sixteen states.

    A state is the bits ``mask`` of two words, shifted right. ``kind``'s type chooses the code
    function: None for bytes, a whole number for halves, a float for fused.
    """
    words = [builder.bitcast(word, _WHOLES) for word in (before, at)]
    states = builder.and_(_call(builder, "llvm.fshr.v16i32", _WHOLES, [*words, shift]), mask)
    x = builder.add(builder.mul(states, multiplier), addend)
    if kinds[-1] is types.none:
        return builder.sitofp(_sum_of_bytes(builder, x, -510), _FLOATS)
    if isinstance(kinds[-1], types.Float):
        total = builder.sitofp(_sum_of_bytes(builder, x, 1024), _FLOATS)
        product = builder.fmul(total, _all(_FLOATS, codes.FACTOR))
        return _rounded_to_half(builder, builder.fadd(product, _all(_FLOATS, codes.OFFSET)))
    x = builder.xor(builder.and_(x, _all(_WHOLES, codes.MASK)), _all(_WHOLES, codes.FLIP))
    halves = builder.shl(x, _all(_WHOLES, 16)), x
    return _rounded_to_half(builder, builder.fadd(*(_high_half(builder, h) for h in halves)))


def _sum_of_bytes(builder: Any, x: Any, start: int) -> Any:
    if SUMS_BYTES:
        ones = _all(_WHOLES, 0x01010101)
        return _call(
            builder, "llvm.x86.avx512.vpdpbusd.512", _WHOLES, [_all(_WHOLES, start), x, ones]
        )
    odd = builder.lshr(x, _all(_WHOLES, 8))
    even, odd = (builder.and_(v, _all(_WHOLES, 0x00FF00FF)) for v in (x, odd))
    two = builder.add(even, odd)
    total = builder.add(two, builder.lshr(two, _all(_WHOLES, 16)))
    return builder.add(builder.and_(total, _all(_WHOLES, 0xFFFF)), _all(_WHOLES, start))


def _high_half(builder: Any, x: Any) -> Any:
    """The high 16 bits as fp16 numbers, in fp32; none is subnormal."""
    sign = builder.and_(x, _all(_WHOLES, 0x80000000))
    size = builder.and_(builder.lshr(x, _all(_WHOLES, 3)), _all(_WHOLES, 0x0FFFE000))
    bits = builder.or_(builder.add(size, _all(_WHOLES, 112 << 23)), sign)
    return builder.bitcast(bits, _FLOATS)


def _rounded_to_half(builder: Any, x: Any) -> Any:
    """fp32 numbers to fp16's nearest, halves to even; smaller ones than 2⁻¹⁴ have few bits."""
    bits = builder.bitcast(x, _WHOLES)
    is_odd = builder.and_(builder.lshr(bits, _all(_WHOLES, 13)), _all(_WHOLES, 1))
    up = builder.add(bits, builder.add(is_odd, _all(_WHOLES, 0xFFF)))
    return builder.bitcast(builder.and_(up, _all(_WHOLES, 0xFFFFE000)), _FLOATS)


def _column(first: int) -> Any:
    """The operation ``(a, b)`` that puts the inputs of one of a pair's two columns in order."""
    lanes = [first + lane for lane in (0, 1, 8, 9, 16, 17, 24, 25)]
    lanes += [lane + 2 for lane in lanes]

    @operation(lambda a, b: a(a, b))
    def ordered(_context: Any, builder: Any, _kinds: Any, a: Any, b: Any) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(_WHOLES, lanes))

    return ordered


low_column, high_column = _column(0), _column(4)
"""Column p of a tile, and column p + 8."""


@jit()
def line_of(K: int) -> int:
    """Words of a copied tile, with room for a vector after the last pair."""
    return 8 * K + LANES


@jit(borrows=True)
def copy_tiles(strings: Any, first: int, count: int, apart: int, K: int, words: Any) -> None:
    """Copy the words of tiles ``first``, ``first + apart``, … to lines of ``words``, fp32.

    A line begins with the tile's last word.
    """
    for i in range(count):
        at, to = (first + i * apart) * TILE * K, i * line_of(K)
        for k in range(K):
            prefetch(strings, at + _AHEAD * apart * TILE * K + 16 * k)
            _move(strings, at + 16 * k, words, to + 1 + 8 * k)
        words[to] = words[to + 8 * K]


@jit(borrows=True)
def geometry(K: int) -> Any:
    """For :func:`pair`: the words and shifts of both vectors."""
    at, to = 4 * LANES * K, 2 * LANES * K
    return (
        load(_WORDS, at), load(_WORDS, at + LANES), load(_SHIFTS, to),
        load(_WORDS, at + 2 * LANES), load(_WORDS, at + 3 * LANES), load(_SHIFTS, to + LANES),
    )  # fmt: skip


@jit(borrows=True)
def pair(words: Any, at: int, K: int, places: Any, function: Any) -> Any:
    """The values of the 32 weights whose word before them is ``words[at]``, as two vectors.

    ``function`` is the mask of a state, the multiplier and the addend, as vectors, and the kind.
    """
    before, last, shift, before_2, last_2, shift_2 = places
    mask, multiplier, addend, kind = function
    if K == 2:  # a vector's new bits are one word: memory repeats it, and no lane is moved
        one, two, three = splat(words[at]), splat(words[at + 1]), splat(words[at + 2])
        return (
            _values(one, two, shift, mask, multiplier, addend, kind),
            _values(two, three, shift_2, mask, multiplier, addend, kind),
        )
    line = load(words, at)
    return (
        _values(lookup(line, before), lookup(line, last), shift, mask, multiplier, addend, kind),
        _values(
            lookup(line, before_2), lookup(line, last_2), shift_2, mask, multiplier, addend, kind
        ),
    )
