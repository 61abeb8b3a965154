"""Decodes walks to C on a CPU, sixteen weights at a time, for numba's kernels.

A pair of vectors has 32 weights: all inputs of the columns p and p + 8 of a tile. K words of 32
bits hold their new bits, and the word before has the rest of the first states. A state is 16 bits
or less of two neighbouring words, shifted together. Its place depends on K and on the lane alone.
So a vector is two permutations of words, a shift and the code function. At 2 bits a vector's new
bits are one word: memory repeats it, and no lane is moved.

The words of a tile are copied beside the last one, which is also before the first. At k + ½ bits
every second pair begins in the middle of a word. So the copy has k + 2 words for each pair: the 32
bits before it, and its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from modulora_kernels.cpu import (
    LANES,
    call,
    jit,
    load,
    lookup,
    on_stack,
    operation,
    place,
    prefetch,
    splat,
)
from numba import types
from numba.core.registry import cpu_target

from modulora_core.packed import PackedWeight
from modulora_qtip import codes
from modulora_qtip.trellis import TILE

TOGETHER = 64
"""Tiles whose words are copied at once: at most 22 KiB."""

_AHEAD = 8  # tiles that are loaded into the cache before they are read

_I64, _INT, _FLOAT = types.int64, ir.IntType(32), ir.FloatType()
_WHOLES, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_EIGHT = ir.VectorType(_FLOAT, 8)

SUMS_BYTES = "+avx512vnni" in str(cpu_target.target_context.codegen().magic_tuple()[2])
"""Whether the processor adds up the bytes of a number in one instruction."""


def _geometry() -> tuple[Any, Any]:
    """By 2 K: words before and at the end of a state, and shifts.

    Words count from the one before a pair's. Both int32, ``[2 K, half of the pair, ...]`` flat, as
    the kernels read them.
    """
    words, shifts = [], []
    for twice in range(17):
        # the last bit of a state, from the pair's first
        last = (np.arange(2 * LANES) + 1) * twice // 2 - 1
        at = np.maximum(last, 0) // 32
        words += [at[:LANES], at[:LANES] + 1, at[LANES:], at[LANES:] + 1]
        shifts += [31 - last[:LANES] % 32, 31 - last[LANES:] % 32]
    return np.concatenate(words).astype(np.int32), np.concatenate(shifts).astype(np.int32)


_WORDS, _SHIFTS = _geometry()


def _all(of: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(of, [value] * of.count)


@operation(lambda source, _at, words, _to: types.void(source, _I64, words, _I64))
def _move(context, builder, kinds, source, at, words, to):
    """``(source, at, words, to)``: eight words of 32 bits from ``source[at]`` on, int16."""
    eight = builder.load(place(context, builder, kinds[0], source, at, _EIGHT), align=2)
    builder.store(eight, place(context, builder, kinds[2], words, to, _EIGHT), align=4)


@operation(lambda words, _to, high, low: types.void(words, _I64, high, low))
def _join(context, builder, kinds, words, to, high, low):
    """``(words, to, high, low)``: a word of two int16."""
    high, low = (builder.zext(half, _INT) for half in (high, low))
    word = builder.or_(builder.shl(high, _INT(16)), low)
    builder.store(word, place(context, builder, kinds[0], words, to, _INT), align=4)


@operation(
    lambda before, at, shift, mask, multiplier, addend, _kind: before(
        before, at, shift, mask, multiplier, addend, _kind
    )
)
def _values(_context, builder, kinds, before, at, shift, mask, multiplier, addend, _kind):
    """``(before, at, shift, mask, multiplier, addend, kind)``: the values of sixteen states.

    A state is the bits ``mask`` of two words, shifted right. ``addend`` is None for 0. ``kind``'s
    type chooses the code function: None for bytes, a whole number for halves, a float for fused.
    """
    words = [builder.bitcast(word, _WHOLES) for word in (before, at)]
    states = builder.and_(call(builder, "llvm.fshr.v16i32", _WHOLES, [*words, shift]), mask)
    x = builder.mul(states, multiplier)
    if kinds[5] is not types.none:
        one = builder.insert_element(ir.Constant(_WHOLES, ir.Undefined), addend, _INT(0))
        x = builder.add(x, builder.shuffle_vector(one, one, _all(_WHOLES, 0)))
    if kinds[-1] is types.none:
        return builder.sitofp(_sum_of_bytes(builder, x, -510), _FLOATS)
    if isinstance(kinds[-1], types.Float):
        total = builder.sitofp(_sum_of_bytes(builder, x, 1024), _FLOATS)
        product = builder.fmul(total, _all(_FLOATS, codes.FACTOR))
        return _rounded_to_half(builder, builder.fadd(product, _all(_FLOATS, codes.OFFSET)))
    x = builder.xor(builder.and_(x, _all(_WHOLES, codes.MASK)), _all(_WHOLES, codes.FLIP))
    halves = builder.shl(x, _all(_WHOLES, 16)), x
    return _rounded_to_half(builder, builder.fadd(*(_high_half(builder, h) for h in halves)))


def _sum_of_bytes(builder, x, start):
    if SUMS_BYTES:
        ones = _all(_WHOLES, 0x01010101)
        return call(
            builder, "llvm.x86.avx512.vpdpbusd.512", _WHOLES, [_all(_WHOLES, start), x, ones]
        )
    odd = builder.lshr(x, _all(_WHOLES, 8))
    even, odd = (builder.and_(v, _all(_WHOLES, 0x00FF00FF)) for v in (x, odd))
    two = builder.add(even, odd)
    total = builder.add(two, builder.lshr(two, _all(_WHOLES, 16)))
    return builder.add(builder.and_(total, _all(_WHOLES, 0xFFFF)), _all(_WHOLES, start))


def _high_half(builder, x):
    """The high 16 bits as fp16 numbers, in fp32; none is subnormal."""
    sign = builder.and_(x, _all(_WHOLES, 0x80000000))
    size = builder.and_(builder.lshr(x, _all(_WHOLES, 3)), _all(_WHOLES, 0x0FFFE000))
    bits = builder.or_(builder.add(size, _all(_WHOLES, 112 << 23)), sign)
    return builder.bitcast(bits, _FLOATS)


def _rounded_to_half(builder, x):
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
    def ordered(_context, builder, _kinds, a, b):
        return builder.shuffle_vector(a, b, ir.Constant(_WHOLES, lanes))

    return ordered


low_column, high_column = _column(0), _column(4)
"""Column p of a tile, and column p + 8."""


def _repeated(count: int) -> Any:
    """The operation ``(array, at, like)``: repeat ``count`` words of 32 bits in a vector.

    ``at`` counts words, in an array of any numbers.
    """
    of = ir.VectorType(_FLOAT, count)
    lanes = ir.Constant(_WHOLES, [lane % count for lane in range(LANES)])

    @operation(lambda array, _at, like: like(array, _I64, like))
    def repeated(context, builder, kinds, array, at, _like):
        data = context.make_array(kinds[0])(context, builder, array).data
        place = builder.gep(builder.bitcast(data, _FLOAT.as_pointer()), [at])
        numbers = builder.load(builder.bitcast(place, of.as_pointer()), align=2)
        return builder.shuffle_vector(numbers, numbers, lanes)

    return repeated


repeat_one, repeat_eight = _repeated(1), _repeated(8)


_KINDS = {"bytes": None, "halves": np.int32(0), "fused": np.float32(0)}


def walks_of(C: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of kernels: strings, 2 K, a state's mask, and the code function."""
    facts = C.metadata
    function = codes.CODES[facts["code"]]
    multiplier = np.uint32(function.multiplier).view(np.int32)
    mask = np.int32((1 << facts["states"]) - 1)
    addend = np.int32(function.addend) if function.addend else None
    twice = int(2 * facts["bits"])
    return (C.tensors["trellis"], twice, mask, multiplier, addend, _KINDS[function.kind])


@jit()
def step_of(twice):
    """Words from a pair to the next one in a line."""
    return (twice >> 1) + 2 * (twice & 1)


@jit()
def line_of(twice):
    """Words of a copied tile, with room for a vector after the last pair."""
    return 8 * step_of(twice) + LANES


@jit(borrows=True)
def _copy_pairs(strings, at, twice, words, to):
    """Copy a tile of k + ½ bits from ``strings[at]`` on: each pair's words after the one before."""
    size = TILE // 2 * twice  # int16 of a tile, the low half of a word first
    for p in range(8):
        unit = p * twice - 2 + size
        for k in range(step_of(twice)):
            high, low = (unit + 2 * k) % size, (unit + 2 * k + 1) % size
            high, low = strings[at + (high ^ 1)], strings[at + (low ^ 1)]
            _join(words, to + p * step_of(twice) + k, high, low)


@jit(borrows=True)
def copy_tiles(strings, first, count, apart, twice, words, line):
    """Copy the words of tiles ``first``, ``first + apart``, … to lines of ``words``, fp32.

    ``line`` is the first of them. A line begins with the tile's last word.
    """
    flat, K = strings.reshape(strings.size), twice >> 1
    for i in range(count):
        at, to = (first + i * apart) * (TILE // 2) * twice, (line + i) * line_of(twice)
        if twice & 1:
            _copy_pairs(flat, at, twice, words, to)
            continue
        for k in range(K):
            prefetch(strings, at + _AHEAD * apart * TILE * K + 16 * k)
            _move(strings, at + 16 * k, words, to + 1 + 8 * k)
        words[to] = words[to + 8 * K]


@jit(borrows=True)
def code_of(weight):
    """For :func:`pair`: a state's mask and the multiplier as vectors, the addend, and the kind."""
    _, _, mask, multiplier, addend, kind = weight
    return splat(mask), splat(multiplier), addend, kind


@jit(borrows=True)
def shifts_of(twice):
    """For :func:`pair`: how far both vectors' states are shifted."""
    to = 2 * LANES * twice
    return load(_SHIFTS, to), load(_SHIFTS, to + LANES)


@jit(borrows=True)
def lanes_of(twice):
    """For :func:`pair`, except at 2 bits: the words of both vectors."""
    at = 4 * LANES * twice
    return (
        load(_WORDS, at), load(_WORDS, at + LANES),
        load(_WORDS, at + 2 * LANES), load(_WORDS, at + 3 * LANES),
    )  # fmt: skip


@jit(borrows=True)
def pair(words, before, at, shifts, lanes, code):
    """The values of 32 weights, as two vectors. Their words begin at ``words[at]``.

    ``before`` is the place of the word before them. At 2 bits ``lanes`` is None, and ``words`` may
    be bit strings; else a line, so that ``before`` is ``at - 1``.
    """
    mask, multiplier, addend, kind = code
    if lanes is None:
        like = splat(np.float32(0))
        a, b = repeat_one(words, before, like), repeat_one(words, at, like)
        c, d = b, repeat_one(words, at + 1, like)
    else:
        line = load(words, before)
        a, b = lookup(line, lanes[0]), lookup(line, lanes[1])
        c, d = lookup(line, lanes[2]), lookup(line, lanes[3])
    return (
        _values(a, b, shifts[0], mask, multiplier, addend, kind),
        _values(c, d, shifts[1], mask, multiplier, addend, kind),
    )


words_of_tiles = on_stack(TOGETHER * (8 * 9 + LANES), np.float32)
"""Room for the words of :data:`TOGETHER` tiles."""
