"""Operations on vectors for decoding.py, in the language of LLVM (docs/how-to/write-kernels.md)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from modulora_kernels.cpu import AHEAD, LANES, call, chosen, operation, place
from numba import types
from numba.core.registry import cpu_target
from torch import Tensor

CODES = 64
"""Codes whose nibbles are found at once."""

_I64, _INDEX, _LANE, _BYTE = types.int64, ir.IntType(64), ir.IntType(32), ir.IntType(8)
_BYTES, _SHORTS = ir.VectorType(_BYTE, CODES), ir.VectorType(ir.IntType(16), CODES)
_WHOLES, _WORDS = ir.VectorType(_LANE, LANES), ir.VectorType(_INDEX, LANES // 2)


def _has(*features: str) -> bool:
    known = str(cpu_target.target_context.codegen().magic_tuple()[2])
    return all(f"+{feature}" in known for feature in features)


PERMUTES_BYTES = _has("avx512vbmi", "avx512bw")
"""Whether kernels are compiled for a processor that permutes bytes, as :func:`finder` needs."""


@operation(lambda codes, _at: _I64(codes, _I64))
def code(context, builder, kinds, codes, at):
    """``(codes, at)``: an unsigned code; ``codes`` are indexed as if they were flat."""
    number = context.get_data_type(kinds[0].dtype)
    return builder.zext(builder.load(place(context, builder, kinds[0], codes, at, number)), _INDEX)


@operation(lambda array, _i, _j, like: like(array, _I64, _I64, like))
def rows(context, builder, kinds, array, i, j, _like):
    """``(array, i, j, like)``: eight numbers from ``array[i]`` on, and eight from ``array[j]`` on.

    ``like`` is a vector of the result's type, here and below."""
    of = ir.VectorType(context.get_data_type(kinds[0].dtype), LANES // 2)
    first, second = (
        builder.load(place(context, builder, kinds[0], array, at, of), align=4) for at in (i, j)
    )
    return chosen(builder, first, range(LANES), second)


@operation(lambda array, _i, _j, like: like(array, _I64, _I64, like))
def two(context, builder, kinds, array, i, j, _like):
    """``(array, i, j, like)``: eight times ``array[i]``, and eight times ``array[j]``."""
    number = context.get_data_type(kinds[0].dtype)
    of, eights = ir.VectorType(number, LANES // 2), []
    for at in (i, j):
        value = builder.load(place(context, builder, kinds[0], array, at, number))
        one = builder.insert_element(ir.Constant(of, ir.Undefined), value, _LANE(0))
        eights.append(chosen(builder, one, [0] * of.count))
    return chosen(builder, eights[0], range(LANES), eights[1])


@operation(lambda words, _at, like: like(words, _I64, like))
def nibbles(context, builder, kinds, words, at, _like):
    """``(words, at, like)``: the nibbles of a word in the low bits of sixteen whole numbers."""
    word = builder.load(place(context, builder, kinds[0], words, at, _INDEX))
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), word, _LANE(0))
    copies = chosen(builder, one, [0] * _WORDS.count)
    shifts = ir.Constant(_WORDS, [4 * lane for lane in range(_WORDS.count)])
    return builder.bitcast(builder.lshr(copies, shifts), _WHOLES)


def finder(high: Tensor, low: Tensor, byte: Tensor) -> Any:
    """The operation that writes the nibbles of 64 codes to 32 words.

    A code of 16 bits has the nibbles ``high[code >> 8] ^ low[code & 255]``, a code of 8 bits
    ``byte[code]``; the tables are ``[256, 8]``.
    """

    def planes(builder: Any, source: list[Any]) -> list[Any]:
        """Four bytes of two nibbles for each code: coordinates 0 and 2, 4 and 6, 1, 3, 5, 7."""
        if len(source) == 1:
            return looked_up(builder, byte, source[0])
        halves = (list(range(odd, 2 * CODES, 2)) for odd in (0, 1))
        a, b = source
        lows, highs = (chosen(builder, a, lanes, b) for lanes in halves)
        found = looked_up(builder, high, highs), looked_up(builder, low, lows)
        return [builder.xor(a, b) for a, b in zip(*found, strict=True)]

    def looked_up(builder: Any, table: Tensor, index: Any) -> list[Any]:
        pairs = [table[:, i] | table[:, i + 2] << 4 for i in (0, 4, 1, 5)]
        return [_permuted(builder, index, pair.tolist()) for pair in pairs]

    @operation(lambda codes, _at, _count, words, _to: types.void(codes, _I64, _I64, words, _I64))
    def find(context, builder, kinds, codes, at, count, words, to):
        """``(codes, at, count, words, to)``: the words of at most 64 codes to ``words[to:]``.

        It reads no more than ``count`` codes, and prefetches as many that are read later."""
        if kinds[0] is types.none:
            return
        size = kinds[0].dtype.bitwidth // 8
        first = place(context, builder, kinds[0], codes, at, _BYTE)
        for line in range(size):
            ahead = builder.gep(first, [_INDEX(AHEAD + CODES * line)])
            hints = [_LANE(hint) for hint in (0, 3, 1)]  # to read, into all caches, data
            call(builder, "llvm.prefetch.p0", ir.VoidType(), [ahead, *hints])
        length = builder.mul(count, _INDEX(size))
        source = [_read(builder, first, length, CODES * part) for part in range(size)]
        even, even_too, odd, odd_too = planes(builder, source)
        evens = _interleaved(builder, even, even_too, _BYTES)
        odds = _interleaved(builder, odd, odd_too, _BYTES)
        for number, (a, b) in enumerate(zip(evens, odds, strict=True)):
            for part, made in enumerate(_interleaved(builder, a, b, _WHOLES)):
                index = builder.add(to, _INDEX(8 * (2 * number + part)))
                builder.store(made, place(context, builder, kinds[3], words, index, _WHOLES), 8)

    return find


def _read(builder, first, length, start):
    """Bytes ``start`` to ``start + 63`` from ``first`` on; zeros beyond ``length``, unread."""
    lanes = ir.Constant(_SHORTS, list(range(start, start + CODES)))
    one = builder.insert_element(
        ir.Constant(_SHORTS, ir.Undefined), builder.trunc(length, ir.IntType(16)), _LANE(0)
    )
    there = builder.icmp_signed("<", lanes, chosen(builder, one, [0] * CODES))
    source = builder.bitcast(builder.gep(first, [_INDEX(start)]), _BYTES.as_pointer())
    arguments = [source, _LANE(1), there, ir.Constant(_BYTES, None)]
    return call(builder, "llvm.masked.load.v64i8.p0", _BYTES, arguments)


def _permuted(builder: Any, index: Any, table: list[int]) -> Any:
    """``table[index]`` for 64 bytes: an instruction takes seven bits of an index, of two halves."""
    parts = [ir.Constant(_BYTES, table[start : start + CODES]) for start in range(0, 256, CODES)]
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    low, high = (call(builder, name, _BYTES, [parts[i], index, parts[i + 1]]) for i in (0, 2))
    is_high = builder.icmp_signed("<", index, ir.Constant(_BYTES, None))
    return builder.select(is_high, high, low)


def _interleaved(builder: Any, a: Any, b: Any, of: ir.VectorType) -> list[Any]:
    """The elements of two vectors by turns, as two vectors."""
    a, b = builder.bitcast(a, of), builder.bitcast(b, of)
    half = of.count // 2
    turns = [[i for k in range(s, s + half) for i in (k, of.count + k)] for s in (0, half)]
    return [chosen(builder, a, lanes, b) for lanes in turns]
