"""INT8 on the CPU, compiled by numba: the same values as :mod:`modulora_int8.reference`, at the speed of memory.

``codes`` are ``[out, in]``, ``scales`` ``[out, groups]``; ``group`` columns share a scale.

Quantizing reads a weight once from memory, for the largest values of its rows, and again from a cache for the codes. While it makes
these it asks memory for what comes then: 4 bytes a value are read, one is written, and that is what it takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu import CPUKernels
from modulora_core.kernels.cpu.conversions import through_half, through_halves
from modulora_core.kernels.cpu.magnitudes import largest_bits
from modulora_core.kernels.cpu.prefetch import FAR, ask_for
from modulora_core.kernels.cpu.shares import signed
from modulora_core.kernels.cpu.vectors import LANES, pointer, splat
from modulora_core.packed import PackedWeight
from modulora_int8.kernels.decode import decode
from modulora_int8.kernels.one_row import one_row
from modulora_int8.reference import HALF_RANGE, LARGEST, SMALLEST_ABSMAX

_ONE, _LARGEST = np.float32(1), np.float32(LARGEST)
_SMALLEST = np.float32(SMALLEST_ABSMAX)
_FROM, _BELOW = np.float32(HALF_RANGE[0]), np.float32(HALF_RANGE[1])

_STEPS_OF_ONE = 1.5 * 2**23  # adding it to less than 2²² rounds to whole numbers, halves to even

_ROWS = 16  # rows that a thread takes at once
_AHEAD = 4096  # how many numbers ahead memory is asked: a row of common width, or two

_BYTE, _INDEX = ir.IntType(8), ir.IntType(64)
_BYTES, _WHOLES, _FLOATS = (
    ir.VectorType(of, LANES) for of in (_BYTE, ir.IntType(32), ir.FloatType())
)


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """Codes, scales, and how many columns share a scale."""
    group = packed.metadata["group_size"] or max(1, packed.shape[1])
    return packed.tensors["codes"], packed.tensors["scales"], group


kernels = CPUKernels(decode, operands, one_row, rounds=True)
tile, product = kernels.tile, kernels.product


def _put_codes(halves: bool) -> Any:
    """The intrinsic that writes codes: of the numbers as they are, or of these rounded to fp16."""

    @intrinsic
    def put(
        _context: Any, x: Any, _at: Any, _vectors: Any, _factor: Any, codes: Any, _to: Any
    ) -> Any:
        """``codes[to + k] = round(factor · x[at + k])`` for so many vectors, of arrays as if they were flat."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, at, vectors, factor, codes, to = arguments
            kinds = signature.args
            factors, steps = (
                splat(builder, factor, _FLOATS),
                ir.Constant(_FLOATS, [_STEPS_OF_ONE] * LANES),
            )
            with cgutils.for_range(builder, vectors) as loop:
                k = builder.mul(loop.index, _INDEX(LANES))
                here = builder.add(at, k)
                then = builder.add(here, _INDEX(_AHEAD))
                ask_for(builder, pointer(context, builder, kinds[0], x, then, _BYTE), FAR)
                values = builder.load(
                    pointer(context, builder, kinds[0], x, here, _FLOATS), align=4
                )
                if halves:
                    values = through_halves(context, builder, values)
                rounded = builder.fsub(builder.fadd(builder.fmul(values, factors), steps), steps)
                found = builder.trunc(builder.fptosi(rounded, _WHOLES), _BYTES)
                place = pointer(context, builder, kinds[4], codes, builder.add(to, k), _BYTES)
                builder.store(found, place, align=1)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(x, i64, i64, types.float32, codes, i64), generate

    return put


_put_codes_of_halves, _put_codes_of_floats = _put_codes(halves=True), _put_codes(halves=False)


@jit(borrows=True)
def _quantize_vectors(
    x: Any, at: int, count: int, halves: bool, factor: Any, codes: Any, to: int
) -> None:
    """So many vectors of sixteen, with ``factor`` codes in 1; ``halves``: rounded to fp16 first."""
    if halves:
        _put_codes_of_halves(x, at, count, factor, codes, to)
    else:
        _put_codes_of_floats(x, at, count, factor, codes, to)


@jit(borrows=True)
def _quantize_group(
    x: Any, at: int, bits: Any, codes: Any, scale: Any, scale_bits: Any, rest: Any, rest_codes: Any
) -> None:
    """A group of a row, which begins at ``x[at]``, as if ``x`` and ``codes`` were flat; ``bits`` are its own alone.

    ``scale`` and ``scale_bits`` are the same single value; ``rest`` and ``rest_codes`` are scratch for what is no whole vector.
    """
    scale_bits[0] = largest_bits(bits)
    halves = _FROM <= scale[0] < _BELOW
    if halves:  # what is largest stays so when all are rounded
        scale[0] = through_half(scale[0])
    factor = _ONE / max(scale[0], _SMALLEST) * _LARGEST
    vectors, over = bits.size // LANES, bits.size % LANES
    _quantize_vectors(x, at, vectors, halves, factor, codes, at)
    if over:
        whole = at + vectors * LANES
        flat, flat_codes = x.reshape(x.size), codes.reshape(codes.size)
        for k in range(over):
            rest[k] = flat[whole + k]
        _quantize_vectors(rest, 0, 1, halves, factor, rest_codes, 0)
        for k in range(over):
            flat_codes[whole + k] = rest_codes[k]


@jit(borrows=True)
def _quantize_rows(
    x: Any, first: int, last: int, group: int, codes: Any, scales: Any, rest: Any, rest_codes: Any
) -> None:
    """Rows ``[first, last)``; ``rest`` and ``rest_codes`` as above."""
    columns = x.shape[1]
    x_bits, scales_bits = x.view(np.int32), scales.view(np.int32)
    for o in range(first, last):
        for g in range(scales.shape[1]):
            a, b = g * group, min((g + 1) * group, columns)
            scale, scale_bits = scales[o, g : g + 1], scales_bits[o, g : g + 1]
            _quantize_group(
                x, o * columns + a, x_bits[o, a:b], codes, scale, scale_bits, rest, rest_codes
            )


@jit(parallel=True)
def quantize(x: Any, group: int, codes: Any, scales: Any) -> None:
    """The fp32 weight ``[out, in]`` to codes and scales: see :func:`modulora_int8.reference.quantize`."""
    for piece in prange((len(x) + _ROWS - 1) // _ROWS):
        rest, rest_codes = np.zeros(LANES, np.float32), np.empty(LANES, np.int8)
        first = signed(piece) * _ROWS
        _quantize_rows(x, first, min(first + _ROWS, len(x)), group, codes, scales, rest, rest_codes)
