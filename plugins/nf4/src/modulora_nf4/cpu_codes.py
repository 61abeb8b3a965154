"""The nearest NF4 level of many values, in registers: what numba's kernels that quantize are made of.

The code of a value is how many of fifteen midpoints are below it. They lie closer together about 0 than at the ends, and a curve that is
steeper there puts one in each of fifteen cells, whose number is the value of the curve without its fraction (-0.5 is in cell 0 too). All
midpoints of lower cells are below the value then, and none of higher ones, so that one comparison, with the midpoint of the cell, is exact.
The ends of cells are so far from any midpoint (``test_nf4.py``) that rounding on the curve doesn't matter.

For sixteen values in code for AVX-512 eight operations, and four to store their bytes; for eight in code for AVX2 eleven, and two.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types

from modulora_core.kernels.cpu.vectors import LANES, call, chosen, has, lookup
from modulora_nf4.reference import LEVELS

_LEVELS = np.array(LEVELS, np.float32)

MIDPOINTS = tuple((_LEVELS[1:] + _LEVELS[:-1]) / np.float32(2))
"""Between two neighbours of the levels each, ascending, fp32. What lies on one takes the lower level."""

STEEPNESS, BEND, MIDDLE = 12.65, 4.9, 7.2
"""The curve over [-1, 1], ``v · (STEEPNESS - BEND · |v|) + MIDDLE``. The ends of cells are 0.3 of a cell from midpoints, about as far as
such a curve can have them. Of a value beyond ±1, which only rounding makes, the cell is still the first or the last."""

_BYTE, _SHORT, _WHOLE, _WORD = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOATS, _WHOLES = (ir.VectorType(of, LANES) for of in (ir.FloatType(), _WHOLE))
_SHORTS, _BYTES = ir.VectorType(_SHORT, LANES), ir.VectorType(_BYTE, 2 * LANES)
_PAIRS, _WORDS = (ir.VectorType(of, LANES // 2) for of in (_BYTE, _WORD))


def codes_of(context: Any, builder: Any, values: Any) -> Any:
    """How many midpoints are below each value: ``<16 x float>`` of [-1, 1] to ``<16 x i32>``."""
    none, one = (ir.Constant(_WHOLES, [number] * LANES) for number in (0, 1))

    def more(codes: Any, midpoints: Any) -> Any:
        return builder.add(
            codes, builder.select(builder.fcmp_ordered(">", values, midpoints), one, none)
        )

    if has(context, "avx512f") or has(context, "avx2"):
        cells = _cells(builder, values)
        return more(
            cells, lookup(context, builder, _vector([*map(float, MIDPOINTS), math.inf]), cells)
        )
    counted = none
    for midpoint in MIDPOINTS:
        counted = more(counted, _vector([float(midpoint)] * LANES))
    return counted


def _vector(numbers: list[float]) -> Any:
    return ir.Constant(_FLOATS, numbers)


def _cells(builder: Any, values: Any) -> Any:
    steepness, bend, middle = (_vector([number] * LANES) for number in (STEEPNESS, -BEND, MIDDLE))
    magnitude = builder.bitcast(
        builder.and_(builder.bitcast(values, _WHOLES), ir.Constant(_WHOLES, [2**31 - 1] * LANES)),
        _FLOATS,
    )
    slope = builder.fadd(
        builder.fmul(magnitude, bend, flags=("contract",)), steepness, flags=("contract",)
    )
    curve = builder.fadd(
        builder.fmul(values, slope, flags=("contract",)), middle, flags=("contract",)
    )
    return builder.fptosi(curve, _WHOLES)


def in_pairs(context: Any, builder: Any, codes: list[Any]) -> list[Any]:
    """Vectors of bytes, one after another, of two codes each, the first one in the high half: of vectors ``<16 x i32>``."""
    if has(context, "avx512f") or not has(context, "avx2"):
        return [_pairs_of_one(builder, of) for of in codes]
    even = len(codes) // 2 * 2
    by_two = [_pairs_of_two(builder, *codes[first : first + 2]) for first in range(0, even, 2)]
    return by_two + [_pairs_of_one(builder, of) for of in codes[even:]]


def _pairs_of_one(builder: Any, codes: Any) -> Any:
    """``<16 x i32>`` to ``<8 x i8>``: two neighbours are one lane of 64 bits."""
    pairs = builder.bitcast(codes, _WORDS)
    four, word = (ir.Constant(_WORDS, [bits] * _WORDS.count) for bits in (4, 32))
    return builder.trunc(builder.or_(builder.shl(pairs, four), builder.lshr(pairs, word)), _PAIRS)


def _pairs_of_two(builder: Any, first: Any, second: Any) -> Any:
    """Two ``<16 x i32>`` to ``<16 x i8>`` by AVX2, which narrows two registers into one, each half of them for itself.

    So bytes 0 to 3 of each half are of the first register, the next four of the second, and so on: half of the bytes change places at the
    end, of which there are fewest then.
    """
    quarters = [chosen(builder, of, range(at, at + 8)) for of in (first, second) for at in (0, 8)]
    shorts = [
        call(builder, "llvm.x86.avx2.packssdw", _SHORTS, quarters[at : at + 2]) for at in (0, 2)
    ]
    narrow = call(builder, "llvm.x86.avx2.packsswb", _BYTES, shorts)
    weights = ir.Constant(_BYTES, [16, 1] * LANES)
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, [narrow, weights])
    halves = [chosen(builder, pairs, range(at, at + 8)) for at in (0, 8)]
    packed = call(builder, "llvm.x86.sse2.packuswb.128", ir.VectorType(_BYTE, LANES), halves)
    order = [half + register + k for register in range(0, 8, 2) for half in (0, 8) for k in (0, 1)]
    return chosen(builder, packed, order)
