"""QuIP#'s codes as words of nibbles, 64 codes at a time, and sixteen values at a time from a word: for AVX-512 that permutes bytes.

A coordinate of a point has few values: of E8P12 the product of 1/2, 3/2 or 5/2 and a sign, plus or minus 1/4; of E8₁ seven. So a
nibble says which, and a table of sixteen floats in one register what it is. The nibbles of a code's eight coordinates are found in
tables of 256 by its byte (E8₁), or are the ``^`` of what is found by its two bytes (E8P12): four bytes, of which a permutation
gives 64 at once. Two codes make a word, even coordinates in its low half and odd ones in the high half. Of a word in eight lanes of 64
bits, each shifted by four bits more than the last, every half begins with the nibble that belongs there: sixteen, in order.

That takes about 50 operations for 64 codes and three for each sixteen values, where :mod:`modulora_quip_sharp_e8.cpu_points` takes
ten for eight. ``words`` is int64 ``[2 · half]``: the words of E8P12's codes, then those of the residual's (:func:`spell_all`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.ir import (
    AHEAD,
    LANES,
    NEAR,
    ask_for,
    call,
    float_to_bf16,
    has,
    lookup,
    loops,
    pointer,
    put_numbers,
    splat,
    sum_of_lanes,
    zeros,
)
from modulora_quip_sharp_e8 import codebooks

CODES = 64
"""Codes that are made words at once."""

PAIRS = CODES // 2

_INDEX = ir.IntType(64)
_BYTES, _WHOLES, _WORDS, _FLOATS = (
    ir.VectorType(of, width)
    for of, width in (
        (ir.IntType(8), CODES),
        (ir.IntType(32), LANES),
        (_INDEX, 8),
        (ir.FloatType(), LANES),
    )
)
_COORDINATES = ((0, 2), (4, 6), (1, 3), (5, 7))
"""Whose nibbles are in which byte of a code: the low one, then the high one."""

_TOGETHER = 2  # words, whose values are rounded by one instruction
_SUMS = 4  # a multiplier waits for its own result: so many sums are made side by side

# bits of E8P12's nibble, beside the number of the magnitude: its sign, and the side that the point is moved to
_NEGATIVE, _BELOW = 4, 8


def _point_tables() -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Nibbles by the high byte of a code and by its low one, ``[256, 8]``; and what their ``^`` means."""
    points = codebooks.e8p()
    parity = torch.tensor([i.bit_count() & 1 for i in range(256)])
    shift = 0.25 - 0.5 * parity[:, None]
    vectors, signs = points[::256] - shift[0], points[:256] - shift
    magnitudes = vectors.abs().unique()
    high = torch.searchsorted(magnitudes, vectors.abs()) | (vectors < 0) * _NEGATIVE
    low = (signs < 0) * _NEGATIVE | parity[:, None] * _BELOW
    levels = [
        (-1.0 if nibble & _NEGATIVE else 1.0)
        * float(magnitudes[min(nibble & 3, len(magnitudes) - 1)])
        + (-0.25 if nibble & _BELOW else 0.25)
        for nibble in range(16)
    ]
    return high, low, levels


def _leaf_tables() -> tuple[torch.Tensor, list[float]]:
    """The same for E8₁ by a code's only byte."""
    points = codebooks.e81()
    levels = points.unique()
    return torch.searchsorted(levels, points), (levels.tolist() + 16 * [0.0])[:16]


def _planes(nibbles: torch.Tensor) -> list[list[int]]:
    """Four tables of 256 bytes."""
    return [
        (nibbles[:, first] | nibbles[:, second] << 4).tolist() for first, second in _COORDINATES
    ]


_HIGH, _LOW, _POINT_LEVELS = _point_tables()
_LEAVES, _LEAF_LEVELS = _leaf_tables()


def _levels(residual: Any) -> ir.Constant:
    """By a nibble: of the codes themselves for None, else of a residual of this type, multiplied by its step, and rounded."""
    if residual is types.none:
        levels = torch.tensor(_POINT_LEVELS)
    elif residual.dtype == types.uint8:
        levels = torch.tensor(_LEAF_LEVELS) * codebooks.residual_step(3)
    else:
        levels = torch.tensor(_POINT_LEVELS) * codebooks.residual_step(4)
    return ir.Constant(_FLOATS, levels.tolist())


def _permuted(builder: Any, index: Any, plane: list[int]) -> Any:
    """``plane[index]`` for 64 bytes."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    tables = [ir.Constant(_BYTES, plane[start : start + CODES]) for start in range(0, 256, CODES)]
    low, high = (
        call(builder, name, _BYTES, [tables[i], index, tables[i + 1]]) for i in (0, 2)
    )  # by seven bits
    is_high = builder.icmp_signed("<", index, ir.Constant(_BYTES, [0] * CODES))
    return builder.select(is_high, high, low)


def _interleaved(builder: Any, a: Any, b: Any, of: ir.VectorType) -> list[Any]:
    """The elements of two vectors in turn, as two vectors."""
    a, b = builder.bitcast(a, of), builder.bitcast(b, of)
    half = of.count // 2
    masks = [
        [i for k in range(start, start + half) for i in (k, of.count + k)] for start in (0, half)
    ]
    lanes = ir.VectorType(ir.IntType(32), of.count)
    return [builder.shuffle_vector(a, b, ir.Constant(lanes, mask)) for mask in masks]


def _every_other(builder: Any, a: Any, b: Any, odd: int) -> Any:
    """Of the bytes of two vectors the even ones, or the odd ones."""
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), CODES), list(range(odd, 2 * CODES, 2)))
    return builder.shuffle_vector(a, b, lanes)


def _nibbles(builder: Any, data: Any, kind: Any) -> list[Any]:
    """Four bytes for each of the 64 codes at ``data``."""
    if kind.dtype == types.uint8:
        codes = builder.load(builder.bitcast(data, _BYTES.as_pointer()), align=1)
        return [_permuted(builder, codes, plane) for plane in _planes(_LEAVES)]
    first, second = (
        builder.load(
            builder.bitcast(builder.gep(data, [_INDEX(start)]), _BYTES.as_pointer()), align=2
        )
        for start in (0, CODES)
    )
    low, high = (_every_other(builder, first, second, odd) for odd in (0, 1))
    return [
        builder.xor(_permuted(builder, high, by_high), _permuted(builder, low, by_low))
        for by_high, by_low in zip(_planes(_HIGH), _planes(_LOW), strict=True)
    ]


@intrinsic
def has_byte_permutations(_context: Any) -> Any:
    """Whether the others can be used: known when a kernel is compiled."""

    def generate(context: Any, _builder: Any, _signature: Any, _arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(_knows(context)))

    return types.boolean(), generate


def _knows(context: Any) -> bool:
    return has(context, "avx512vbmi") and has(context, "avx512bw")


@intrinsic
def spell(_context: Any, codes: Any, _at: Any, _count: Any, words: Any, _first: Any) -> Any:
    """The words of ``count`` codes from number ``at`` on to ``words[first : first + PAIRS]``: of E8P12 for int16, of E8₁ for uint8.

    All are written; no more codes than ``count``, at most CODES, are read. As many that are read later are asked for.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _knows(context):
            return context.get_dummy_value()
        codes, at, count, words, first = arguments
        kinds = signature.args
        here = pointer(context, builder, kinds[0], codes, at, ir.IntType(8))
        for line in range(0, CODES * kinds[0].dtype.bitwidth // 8, 64):
            ask_for(builder, builder.gep(here, [_INDEX(AHEAD + line)]), NEAR)
        source = _whole(context, builder, kinds[0], codes, at, count)
        even, even_too, odd, odd_too = _nibbles(builder, source, kinds[0])
        evens = _interleaved(builder, even, even_too, _BYTES)
        odds = _interleaved(builder, odd, odd_too, _BYTES)
        for number, (a, b) in enumerate(zip(evens, odds, strict=True)):
            for part, made in enumerate(_interleaved(builder, a, b, _WHOLES)):
                index = builder.add(first, _INDEX(8 * (2 * number + part)))
                place = pointer(context, builder, kinds[3], words, index, _WHOLES)
                builder.store(made, place, align=8)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(codes, i64, i64, words, i64), generate


def _whole(context: Any, builder: Any, kind: Any, codes: Any, at: Any, count: Any) -> Any:
    """Where CODES codes can be read: where they are, or, if they are fewer, in a copy with zeros behind."""
    size = kind.dtype.bitwidth // 8
    source = pointer(context, builder, kind, codes, at, ir.IntType(8))
    room = ir.ArrayType(ir.IntType(8), CODES * size)
    copy = cgutils.alloca_once(builder, room)
    start = builder.bitcast(copy, source.type)
    is_short = builder.icmp_signed("<", count, _INDEX(CODES))
    with builder.if_then(is_short, likely=False):
        builder.store(ir.Constant(room, None), copy)
        cgutils.raw_memcpy(builder, start, source, count, size)
    return builder.select(is_short, start, source)


def _sixteen(
    context: Any, builder: Any, kind: Any, words: Any, index: Any, levels: ir.Constant
) -> Any:
    """The sixteen values of ``words[index]``."""
    word = builder.load(pointer(context, builder, kind, words, index, _INDEX))
    shifts = ir.Constant(_WORDS, [4 * lane for lane in range(8)])
    nibbles = builder.lshr(splat(builder, word, _WORDS), shifts)
    return lookup(context, builder, levels, builder.bitcast(nibbles, _WHOLES))


def _values(context: Any, builder: Any, kinds: Any, words: Any, index: Any, half: Any) -> Any:
    """C at the codes of a word; ``kinds`` are those of the words and of the residual, which is None at 2 bits."""
    kind, residual = kinds
    values = _sixteen(context, builder, kind, words, index, _levels(types.none))
    if residual is types.none:
        return values
    left = _sixteen(context, builder, kind, words, builder.add(index, half), _levels(residual))
    return builder.fadd(values, left)


@intrinsic
def expand(
    _context: Any,
    words: Any,
    residual: Any,
    _first: Any,
    _half: Any,
    _columns: Any,
    out: Any,
    _at: Any,
) -> Any:
    """The values of so many columns from word ``first`` on to ``out[at : at + columns]``, as if it were flat, fp32 or rounded to bf16.

    ``residual`` is None at 2 bits; at 3 and 4 its dtype says what it is.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _knows(context):
            return context.get_dummy_value()
        words, _, first, half, columns, out, at = arguments
        kinds = signature.args

        def index(word: Any) -> Any:
            return builder.add(at, builder.mul(word, _INDEX(LANES)))

        def values(word: Any) -> Any:
            return _values(context, builder, kinds[:2], words, builder.add(first, word), half)

        whole, rest = builder.sdiv(columns, _INDEX(LANES)), builder.srem(columns, _INDEX(LANES))
        for width, word in loops(builder, whole, _TOGETHER):
            several = [values(builder.add(word, _INDEX(part))) for part in range(width)]
            put_numbers(context, builder, kinds[5], out, index(word), several)
        with builder.if_then(builder.icmp_signed(">", rest, _INDEX(0)), likely=False):
            numbers = values(whole)
            if kinds[5].dtype is types.int16:
                numbers = float_to_bf16(builder, numbers)
            last = cgutils.alloca_once(builder, numbers.type)
            builder.store(numbers, last)
            place = pointer(context, builder, kinds[5], out, index(whole), numbers.type)
            cgutils.raw_memcpy(builder, place, last, rest, kinds[5].dtype.bitwidth // 8)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(words, residual, i64, i64, i64, out, i64), generate


@intrinsic
def dot(
    _context: Any, words: Any, residual: Any, _first: Any, _half: Any, _pairs: Any, x: Any
) -> Any:
    """The sum of the values of so many words from ``first`` on times fp32 ``x[: 16 · pairs]``; ``residual`` as for :func:`expand`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _knows(context):
            return ir.Constant(ir.FloatType(), 0.0)
        words, _, first, half, pairs, x = arguments
        kinds = signature.args
        totals = zeros(builder, _SUMS)
        for width, begin in loops(builder, pairs, _SUMS):
            for part in range(width):
                pair = builder.add(begin, _INDEX(part))
                index = builder.mul(pair, _INDEX(LANES))
                factors = builder.load(
                    pointer(context, builder, kinds[5], x, index, _FLOATS), align=4
                )
                values = _values(context, builder, kinds[:2], words, builder.add(first, pair), half)
                more = builder.fmul(values, factors, flags=("contract",))
                more = builder.fadd(builder.load(totals[part]), more, flags=("contract",))
                builder.store(more, totals[part])
        return sum_of_lanes(builder, functools.reduce(builder.fadd, map(builder.load, totals)))

    i64 = types.int64
    return types.float32(words, residual, i64, i64, i64, x), generate


@jit()
def rows_together(blocks: int, most: int) -> int:
    """How many rows of so many codes to make words of at once, at most ``most``: as many as leave none of CODES places empty.

    A row of 72 codes alone would take as long as one of 128.
    """
    return 1 if blocks % 2 else min(most, CODES // math.gcd(blocks, CODES))


@jit()
def half_of(count: int) -> int:
    """The words of so many codes, with those that are made beside them: half of what ``words`` needs to hold."""
    return (count + CODES - 1) // CODES * PAIRS


@jit(borrows=True)
def spell_all(codes: Any, residual: Any, bits: int, at: int, count: int, words: Any) -> None:
    """The words of ``count`` codes from number ``at`` on, and of as many of a residual, to either half of ``words``."""
    half = half_of(count)
    for start in range(0, count, CODES):
        size = min(CODES, count - start)
        spell(codes, at + start, size, words, start // 2)
        if bits > 2:
            spell(residual, at + start, size, words, half + start // 2)
