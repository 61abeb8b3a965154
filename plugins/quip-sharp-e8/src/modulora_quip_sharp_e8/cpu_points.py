"""QuIP#'s codes looked up in tables of points, eight numbers at a time, on whatever vector registers the processor has.

A point of E8P12 is one row of a table by its vector, times one by its signs, plus ±1/4 for all coordinates: exact in any order. A point of
E8₁ is one row of a table. The tables, 8 KiB each, stay in the L1 cache, and what bounds the loops are their loads: codes are loaded four at
a time, and in a product the ±1/4 is multiplied by the sum of a block's eight x, eight blocks at once.

Where bytes can be permuted, :mod:`modulora_quip_sharp_e8.cpu_words` is faster, and these aren't used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels.cpu.ir import (
    assembly,
    float_to_bf16,
    has,
    matrix,
    multiply_add,
    splat,
    sum_of_lanes,
    zeros,
)
from modulora_quip_sharp_e8 import codebooks

_BYTE, _CODE, _WHOLE, _INDEX = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_EIGHT, _WHOLES = ir.VectorType(_FLOAT, codebooks.BLOCK), ir.VectorType(_WHOLE, codebooks.BLOCK)

ROWS = 4
"""Rows that are multiplied at once, by which each x is loaded."""

_AT_ONCE = 8  # blocks whose ±1/4 are multiplied at once
_IN_WORD = 4  # codes of 16 bits


def _tables() -> tuple[list[list[float]], list[list[float]], list[float]]:
    """``vectors[code >> 8] * signs[code & 255] + shift[code & 255]`` is the point: ``[256, 8]`` twice and ``[256]``."""
    points = codebooks.e8p().numpy()
    shift = np.float32(0.25) - np.float32(0.5) * np.array(
        [i.bit_count() & 1 for i in range(256)], np.float32
    )
    signs = np.sign(points[:256] - shift[:, None])  # vector 0 is (1/2)⁸
    vectors = points[::256] - shift[0]  # signs 0 are none
    return vectors.tolist(), signs.tolist(), shift.tolist()


_VECTORS, _SIGNS, _SHIFT = _tables()


def _table(builder: Any, name: str, rows: list[Any]) -> Any:
    """A constant of the module: vectors of eight, or numbers."""
    of = _EIGHT if isinstance(rows[0], list) else _FLOAT
    table = ir.Constant(ir.ArrayType(of, len(rows)), [of(row) for row in rows])
    return cgutils.global_constant(builder, name, table)


class _Points:
    """Looks up codes in an intrinsic that is generated.

    Args:
        kind: numba's type of the array of codes: int16 for E8P12, uint8 for E8₁.
        scale: what points of E8₁ are multiplied by, and rounded.
        named: whether bits are turned by an instruction of BMI2, by its name. LLVM prefers shifts, which change their register and so cost
            a copy; where more is looked up it puts them in a better order.
    """

    def __init__(self, builder: Any, kind: Any, scale: float = 1.0, *, named: bool = False) -> None:
        self._builder, self.are_leaves, self._named = builder, kind.dtype == types.uint8, named
        if self.are_leaves:
            leaves = codebooks.e81() * scale
            self._leaves = _table(builder, "leaves", leaves.tolist())
        else:
            self._vectors = _table(builder, "vectors", _VECTORS)
            self._signs, self._shift = (
                _table(builder, "signs", _SIGNS),
                _table(builder, "shift", _SHIFT),
            )

    def codes(self, data: Any, at: Any, count: int) -> list[tuple[Any, int]]:
        """``count`` codes from number ``at`` on, at most four: words of 64 bits, and where in them they begin."""
        builder = self._builder
        place = builder.gep(data, [at])
        width = 8 if self.are_leaves else 16
        word = builder.load(builder.bitcast(place, ir.IntType(width * count).as_pointer()), align=1)
        word = word if word.type == _INDEX else builder.zext(word, _INDEX)
        return [(word, width * k) for k in range(count)]

    def point(self, code: tuple[Any, int], *, shifted: bool = True) -> Any:
        """The eight coordinates; without its ±1/4 where it isn't to be ``shifted``."""
        if self.are_leaves:
            return self._row(self._leaves, code, 0)
        builder = self._builder
        product = builder.fmul(
            self._row(self._vectors, code, 1), self._row(self._signs, code, 0), flags=("contract",)
        )
        if not shifted:
            return product
        shift = splat(builder, self._row(self._shift, code, 0), _EIGHT)
        return builder.fadd(product, shift, flags=("contract",))

    def _row(self, table: Any, code: tuple[Any, int], of_byte: int) -> Any:
        """The row of a table, or its number, by a byte of a code: its eight bits are turned to where they count rows in bytes."""
        builder, (word, bit) = self._builder, code
        of = table.type.pointee.element
        width = 5 if of == _EIGHT else 2  # rows of 32 bytes, numbers of 4
        turn = (bit + 8 * of_byte - width) % 64
        if self._named:
            turned = assembly(builder, f"rorxq $${turn}, $1, $0", _INDEX, [word], "=r,r")
        else:
            turned = builder.or_(
                builder.lshr(word, _INDEX(turn)), builder.shl(word, _INDEX(64 - turn))
            )
        offset = builder.and_(turned, _INDEX(255 << width))
        place = builder.gep(builder.bitcast(table, _BYTE.as_pointer()), [offset])
        return builder.load(builder.bitcast(place, of.as_pointer()))


def _step(residual: Any) -> float:
    """What a residual of this type is multiplied by."""
    return float(codebooks.residual_step(3 if residual.dtype == types.uint8 else 4))


@intrinsic
def expand_points(
    _context: Any, codes: Any, residual: Any, _at: Any, _count: Any, out: Any, _to: Any
) -> Any:
    """C at ``count`` codes from number ``at`` on to ``out[to : to + 8 count]``, as if arrays were flat, fp32 or rounded to bf16.

    ``residual`` is None at 2 bits; at 3 and 4 its dtype says what it is.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, residual, at, count, out, to = arguments
        kinds = signature.args
        source = matrix(context, builder, kinds[0], codes)[0]
        target = matrix(context, builder, kinds[4], out)[0]
        points = _Points(builder, kinds[0])
        left, left_source = None, None
        if kinds[1] is not types.none:
            left = _Points(builder, kinds[1], _step(kinds[1]))
            left_source = matrix(context, builder, kinds[1], residual)[0]

        def write(first: Any, width: int) -> None:
            found = [points.point(code) for code in points.codes(source, first, width)]
            if left is not None:
                more = [left.point(code) for code in left.codes(left_source, first, width)]
                if not left.are_leaves:
                    step = splat(builder, _FLOAT(_step(kinds[1])), _EIGHT)
                    more = [builder.fmul(value, step) for value in more]
                found = [builder.fadd(value, rest) for value, rest in zip(found, more, strict=True)]
            for k, value in enumerate(found):
                block = builder.add(builder.sub(first, at), _INDEX(k))
                place = builder.gep(
                    target, [builder.add(to, builder.mul(block, _INDEX(codebooks.BLOCK)))]
                )
                stored = float_to_bf16(builder, value) if kinds[4].dtype is types.int16 else value
                builder.store(stored, builder.bitcast(place, stored.type.as_pointer()), align=2)

        _by_words(builder, at, count, _IN_WORD, write)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(codes, residual, i64, i64, out, i64), generate


def _by_words(builder: Any, at: Any, count: Any, width: int, do: Any) -> None:
    """``do(first, width)`` for ``width`` at a time, then ``do(first, 1)`` for the rest, of ``count`` from ``at`` on."""
    words = builder.sdiv(count, _INDEX(width))
    with cgutils.for_range(builder, words) as loop:
        do(builder.add(at, builder.mul(loop.index, _INDEX(width))), width)
    done = builder.mul(words, _INDEX(width))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        do(builder.add(at, builder.add(done, loop.index)), 1)


@intrinsic
def dot_points(_context: Any, codes: Any, rows: Any, _count: Any, x: Any, sums: Any) -> Any:
    """The sums of the points of ``count`` codes times ``x[: 8 count]``, of four rows, which begin at the codes of the numbers ``rows``.

    ``sums`` has the sum of the eight x of each block; ``codes`` may be E8P12's or E8₁'s.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, rows, count, x, sums = arguments
        kinds = signature.args
        points = _Points(builder, kinds[0], named=has(context, "bmi2"))
        source, factors, of_blocks = (
            matrix(context, builder, kinds[i], array)[0]
            for i, array in ((0, codes), (3, x), (4, sums))
        )
        starts = cgutils.unpack_tuple(builder, rows, ROWS)
        totals, shifts = (
            zeros(builder, ROWS, codebooks.BLOCK),
            zeros(builder, ROWS, codebooks.BLOCK),
        )
        # AVX2 moves bits by another number in each lane, which the parity takes
        apart = has(context, "avx2") and not points.are_leaves

        def multiply(first: Any, width: int, shifted: bool) -> None:
            found = [points.codes(source, builder.add(start, first), width) for start in starts]
            for k in range(width):
                at = builder.mul(builder.add(first, _INDEX(k)), _INDEX(codebooks.BLOCK))
                factor = _eight_at(builder, factors, at)
                for total, of_row in zip(totals, found, strict=True):
                    multiply_add(builder, total, points.point(of_row[k], shifted=shifted), factor)

        whole = builder.mul(builder.sdiv(count, _INDEX(_AT_ONCE)), _INDEX(_AT_ONCE))
        if apart:
            _add_signed(builder, source, starts, whole, of_blocks, shifts)
        _by_words(
            builder,
            _INDEX(0),
            whole,
            _IN_WORD,
            lambda first, width: multiply(first, width, not apart),
        )
        rest = builder.sub(count, whole)
        _by_words(builder, whole, rest, 1, lambda first, width: multiply(first, width, True))
        quarter = splat(builder, _FLOAT(0.25), _EIGHT)
        for total, shift in zip(totals, shifts, strict=True):
            multiply_add(builder, total, builder.load(shift), quarter)
        return cgutils.pack_array(
            builder, [sum_of_lanes(builder, builder.load(total)) for total in totals]
        )

    return types.UniTuple(types.float32, ROWS)(codes, rows, types.int64, x, sums), generate


def _add_signed(
    builder: Any, source: Any, starts: list[Any], count: Any, values: Any, totals: list[Any]
) -> None:
    """Add ``values``, one for each of ``count`` codes, a multiple of eight, with the sign of its ±1/4, to each row's total, by lanes."""
    with cgutils.for_range(builder, builder.sdiv(count, _INDEX(_AT_ONCE))) as loop:
        first = builder.mul(loop.index, _INDEX(_AT_ONCE))
        eight = _eight_at(builder, values, first)
        for total, start in zip(totals, starts, strict=True):
            signed = _signed_by_parity(
                builder, builder.gep(source, [builder.add(start, first)]), eight
            )
            builder.store(builder.fadd(builder.load(total), signed), total)


def _eight_at(builder: Any, data: Any, index: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [index]), _EIGHT.as_pointer()), align=4)


def _signed_by_parity(builder: Any, codes: Any, values: Any) -> Any:
    """Eight values, negated where the signs of the code there are odd in number."""

    def whole(number: int) -> Any:
        return ir.Constant(_WHOLES, [number] * codebooks.BLOCK)

    words = builder.load(
        builder.bitcast(codes, ir.VectorType(_CODE, codebooks.BLOCK).as_pointer()), align=2
    )
    bits = builder.zext(words, _WHOLES)
    folded = builder.xor(bits, builder.lshr(bits, whole(4)))
    # of a number of four bits the parity is a bit of 0x6996, which comes to the sign's place
    place = builder.and_(builder.xor(folded, whole(15)), whole(15))
    sign = builder.and_(builder.shl(whole(0x69960000), place), whole(0x80000000))
    return builder.bitcast(builder.xor(builder.bitcast(values, _WHOLES), sign), _EIGHT)
