"""How the CPU decodes NF4, compiled by numba: the values of :mod:`modulora_nf4.reference` at the speed of memory.

Everything works on the flat, row-major weight: element ``i`` is in block ``i >> shift`` and in byte
``i >> 1``, and a row may start in the middle of either. ``absmax`` is fp32 and starts at block ``first``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_core.kernels.prefetch import read_ahead
from modulora_core.kernels.vectors import has, lookup, pointer, splat
from modulora_nf4.reference import LEVELS

_LEVELS = np.array(LEVELS, np.float32)
_PAIRS = np.stack([np.repeat(_LEVELS, 16), np.tile(_LEVELS, 16)], axis=1)  # [256, 2]: both values of a byte

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _vector(values: Any, of: ir.Type) -> ir.Constant:
    number = float if of is _F32 else int
    return ir.Constant(ir.VectorType(of, len(values)), [number(v) for v in values])


def levels(context: Any, builder: Any, index: Any) -> Any:
    """The levels of sixteen codes: ``<16 x i32>``, of which the low four bits are looked at, to ``<16 x float>``."""
    return lookup(context, builder, _vector(_LEVELS, _F32), index)


def _sixteen_levels(context: Any, builder: Any, codes: Any) -> Any:
    """The levels of eight bytes of codes, in order: ``<8 x i8>`` to ``<16 x float>``."""
    if not has(context, "avx2") and not has(context, "avx512f"):
        return _levels_by_bytes(builder, codes)
    # a byte becomes two 32-bit lanes, high nibble first
    wide = builder.zext(codes, ir.VectorType(_I64, 8))
    both = builder.or_(builder.lshr(wide, _vector([4] * 8, _I64)), builder.shl(wide, _vector([32] * 8, _I64)))
    return levels(context, builder, builder.bitcast(both, ir.VectorType(_I32, 16)))


def _levels_by_bytes(builder: Any, codes: Any) -> Any:
    """The same without instructions for a lookup: a byte's two values are side by side in a table of 256 pairs."""
    table = ir.Constant(ir.ArrayType(_F32, _PAIRS.size), _PAIRS.ravel().tolist())
    pairs = cgutils.global_constant(builder, "nf4_pairs", table)
    found = ir.Constant(ir.VectorType(_F32, 16), ir.Undefined)
    for k in range(16):
        byte = builder.zext(builder.extract_element(codes, _I32(k // 2)), _I64)
        at = builder.or_(builder.shl(byte, _I64(1)), _I64(k % 2))
        found = builder.insert_element(found, builder.load(builder.gep(pairs, [_I64(0), at])), _I32(k))
    return found


@intrinsic
def _decode_sixteen(_context: Any, out: Any, at: Any, codes: Any, byte: Any, scale: Any) -> Any:
    """``out[at : at + 16] = scale * levels`` of ``codes[byte : byte + 8]``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, at, codes, byte, scale = arguments
        source = pointer(context, builder, signature.args[2], codes, byte, ir.VectorType(_I8, 8))
        sixteen = _sixteen_levels(context, builder, builder.load(source, align=1))
        target = pointer(context, builder, signature.args[0], out, at, sixteen.type)
        builder.store(builder.fmul(sixteen, splat(builder, scale, sixteen.type)), target, align=4)
        return context.get_dummy_value()

    return types.void(out, at, codes, byte, scale), generate


@jit(borrows=True)
def _decode(codes: Any, absmax: Any, first: int, shift: int, start: int, out: Any) -> None:
    """Elements ``start ...`` of the flat weight to all of ``out``."""
    stop = start + out.size
    i, o = start, 0
    while i < stop:
        block = i >> shift
        scale = absmax[block - first]
        end = min(stop, (block + 1) << shift)
        if i & 1:
            out[o] = _PAIRS[codes[i >> 1], 1] * scale
            i, o = i + 1, o + 1
        while i + 16 <= end:
            _decode_sixteen(out, o, codes, i >> 1, scale)
            i, o = i + 16, o + 16
        while i + 2 <= end:
            out[o] = _PAIRS[codes[i >> 1], 0] * scale
            out[o + 1] = _PAIRS[codes[i >> 1], 1] * scale
            i, o = i + 2, o + 2
        if i < end:
            out[o] = _PAIRS[codes[i >> 1], 0] * scale
            i, o = i + 1, o + 1


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...`` of the rows from ``row`` on: see :class:`modulora_core.kernels.products.RowKernels`.

    ``weight`` is codes, absmax, the block that absmax starts at, shift, and the length of a row.
    """
    codes, absmax, first, shift, in_features = weight
    for r in range(len(out)):
        begin = (row + r) * in_features + start
        read_ahead(codes, begin // 2, columns // 2)
        _decode(codes, absmax, first, shift, begin, out[r, :columns])
