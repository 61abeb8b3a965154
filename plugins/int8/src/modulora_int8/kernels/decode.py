"""How the CPU decodes INT8, compiled by numba: the values of :mod:`modulora_int8.reference` at the speed of memory.

``codes`` are ``[out, in]``, ``scales`` ``[out, groups]``; ``group`` columns share a scale. LLVM's own vectorised loops spend more on
entering them than on a group of 64, so sixteen values at a time are spelled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.cpu.conversions import narrow, put_numbers
from modulora_core.kernels.cpu.prefetch import read_ahead
from modulora_core.kernels.cpu.vectors import LANES, loops, pointer, splat
from modulora_int8 import reference

INVERSE = np.float32(reference.INVERSE)

_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()
_BYTES, _FLOATS = (ir.VectorType(of, LANES) for of in (ir.IntType(8), _FLOAT))

_AT_ONCE = 4  # vectors: what a loop costs is shared by so many


def numbers(context: Any, builder: Any, kind: Any, codes: Any, index: Any) -> Any:
    """Sixteen codes from ``codes[index]`` on, as if it were flat, as fp32."""
    source = pointer(context, builder, kind, codes, index, _BYTES)
    return builder.sitofp(builder.load(source, align=1), _FLOATS)


@intrinsic
def _scale(_context: Any, codes: Any, _at: Any, _by: Any, out: Any, _to: Any, _vectors: Any) -> Any:
    """``out[to + k] = codes[at + k] · by · INVERSE``, rounded twice, for so many vectors of sixteen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, at, by, out, to, vectors = arguments
        kinds = signature.args
        factor, inverse = (
            splat(builder, by, _FLOATS),
            ir.Constant(_FLOATS, [float(INVERSE)] * LANES),
        )
        for width, first in loops(builder, vectors, _AT_ONCE):
            k = builder.mul(first, _INDEX(LANES))
            places = [
                builder.add(builder.add(at, k), _INDEX(part * LANES)) for part in range(width)
            ]
            steps = [numbers(context, builder, kinds[0], codes, place) for place in places]
            values = [builder.fmul(builder.fmul(step, factor), inverse) for step in steps]
            put_numbers(context, builder, kinds[3], out, builder.add(to, k), values)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(codes, i64, types.float32, out, i64, i64), generate


@jit(borrows=True)
def _decode(codes: Any, scales: Any, group: int, row: int, start: int, out: Any) -> None:
    """Columns ``start ...`` of one row to all of ``out``."""
    begin, k = row * codes.shape[1] + start, 0
    index = start // group  # counted from here on: to divide takes as long as some vectors
    while k < out.size:
        end = min(out.size, (index + 1) * group - start)
        scale, vectors = scales[row, index], (end - k) // LANES
        _scale(codes, begin + k, scale, out, k, vectors)
        k += vectors * LANES
        while k < end:
            out[k] = narrow(np.float32(codes[row, start + k]) * scale * INVERSE, out[k])
            k += 1
        index += 1


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...`` of the rows from ``row`` on: see :class:`modulora_core.kernels.cpu.products.RowKernels`.

    ``weight`` is codes, scales and the columns of a group.
    """
    codes, scales, group = weight
    for r in range(len(out)):
        read_ahead(codes, (row + r) * codes.shape[1] + start, columns)
        _decode(codes, scales, group, row + r, start, out[r, :columns])
