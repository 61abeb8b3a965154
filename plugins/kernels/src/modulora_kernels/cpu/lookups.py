"""Look numbers up in a table of sixteen, which stays in registers."""

# ruff: noqa: PLW0108 - numba counts the arguments of a lambda

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils

from modulora_kernels.compiled import jit
from modulora_kernels.cpu.vectors import (
    FLOAT,
    INT,
    LANES,
    Floats,
    Shorts,
    Wholes,
    bf16_bits,
    call,
    chosen,
    constant,
    has,
    llvm,
    operation,
    put,
    put_rounded,
)

_FLOATS, _WHOLES, _SHORTS = (llvm(kind) for kind in (Floats, Wholes, Shorts))


@operation(lambda table, index: Floats(table, index))
def lookup(_context, builder, _kinds, table, index):
    """``(table, index)``: ``table[index & 15]``, of :data:`Floats` by :data:`Wholes`."""
    return _looked_up(builder, table, index)


def _looked_up(builder, table, index):
    if has("avx512f"):
        return call(builder, "llvm.x86.avx512.permvar.sf.512", _FLOATS, [table, index])
    if has("avx2"):
        eights = [_looked_up_eight(builder, table, index, at) for at in (0, 8)]
        return chosen(builder, eights[0], range(LANES), eights[1])
    room = cgutils.alloca_once(builder, _FLOATS)
    builder.store(table, room)
    numbers, found = builder.bitcast(room, FLOAT.as_pointer()), ir.Constant(_FLOATS, ir.Undefined)
    for lane in range(LANES):
        at = builder.and_(builder.extract_element(index, INT(lane)), INT(LANES - 1))
        found = builder.insert_element(found, builder.load(builder.gep(numbers, [at])), INT(lane))
    return found


def _looked_up_eight(builder, table, index, first):
    """AVX2 looks up three bits: do so in both halves of the table, and choose by the fourth bit."""
    eight = chosen(builder, index, range(first, first + 8))
    of = ir.VectorType(FLOAT, 8)
    halves = (chosen(builder, table, range(at, at + 8)) for at in (0, 8))
    found = [call(builder, "llvm.x86.avx2.permps", of, [half, eight]) for half in halves]
    sign = builder.bitcast(builder.shl(eight, constant(eight.type, 28)), of)
    return call(builder, "llvm.x86.avx.blendv.ps.256", of, [*found, sign])


_BY_BYTES = has("avx2") and not has("avx512f")

PAIR_ORDER = tuple(
    8 * (k // 8) + 2 * (k % 4) + (k % 8 < 4) if _BY_BYTES else 2 * (k % LANES) + k // LANES
    for k in range(2 * LANES)
)
"""Result k of :func:`lookup_pairs` belongs to code ``PAIR_ORDER[k]``; code 2 i is the high half of
byte i."""


@operation(lambda table, pairs: types.UniTuple(Floats, 2)(table, pairs))
def lookup_pairs(context, builder, _kinds, table, pairs):
    """``(table, pairs)``: look up both halves of 16 bytes; results are in :data:`PAIR_ORDER`."""
    if _BY_BYTES:
        found = _looked_up_by_bytes(builder, table, pairs)
    else:
        high = builder.lshr(pairs, constant(_WHOLES, 4))
        found = [_looked_up(builder, table, index) for index in (high, pairs)]
    return context.make_tuple(builder, types.UniTuple(Floats, 2), found)


@jit(borrows=True)
def reorder(x, order, out):
    """``out[i + k] = x[i + order[k]]`` for each run of ``order.size`` numbers from i on."""
    for start in range(0, out.size, order.size):
        for k in range(order.size):
            out[start + k] = x[start + order[k]]


def _looked_up_by_bytes(builder, table, pairs):
    """AVX2 looks up bytes: look up each of a number's four bytes, and join them."""
    of_bytes, of_words = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(64), 4)
    codes = builder.trunc(pairs, ir.VectorType(ir.IntType(8), LANES))
    twice = builder.bitcast(chosen(builder, codes, 2 * list(range(LANES))), of_words)
    halves = builder.bitcast(builder.lshr(twice, ir.Constant(of_words, [0, 0, 4, 4])), of_bytes)
    index = builder.and_(halves, constant(of_bytes, 15))
    of_table = builder.bitcast(table, ir.VectorType(ir.IntType(8), 4 * LANES))
    planes = [
        chosen(builder, of_table, 2 * [4 * k + byte for k in range(LANES)]) for byte in range(4)
    ]
    parts = [call(builder, "llvm.x86.avx2.pshuf.b", of_bytes, [plane, index]) for plane in planes]
    low, high = (_in_turn(builder, parts[at], parts[at + 1], ir.IntType(16)) for at in (0, 2))
    eights = [_in_turn(builder, a, b, FLOAT) for a, b in zip(low, high, strict=True)]
    return [chosen(builder, first, range(LANES), second) for first, second in eights]


def _in_turn(builder: Any, a: Any, b: Any, number: ir.Type) -> list[Any]:
    """Interleave a and b within 128 bits: two registers of numbers that are twice as wide."""
    count = a.type.count
    of, quarter, found = ir.VectorType(number, count // 2), count // 4, []
    for start in (0, quarter):
        firsts = (at + k for at in (start, start + count // 2) for k in range(quarter))
        lanes = [lane + other for lane in firsts for other in (0, count)]
        found.append(builder.bitcast(chosen(builder, a, lanes, b), of))
    return found


def _table_of(out):
    return Shorts if out.dtype is types.int16 and has("avx512bw") else Floats


@operation(lambda out, values: _table_of(out)(out, values))
def table_for(_context, builder, kinds, _out, values):
    """``(out, values)``: the table of :func:`store_lookup`, in bf16 if ``out`` is."""
    if _table_of(kinds[0]) == Floats:
        return values
    # twice: AVX-512 looks at five bits of an index, and the fifth may be anything
    return chosen(builder, bf16_bits(builder, values), 2 * list(range(LANES)))


@operation(lambda out, _at, table, index: types.void(out, types.int64, table, index))
def store_lookup(context, builder, kinds, out, at, table, index):
    """``(out, at, table, index)``: store 32 values by the low four bits of :data:`Shorts`."""
    if kinds[2] == Shorts:
        found = call(builder, "llvm.x86.avx512.permvar.hi.512", _SHORTS, [table, index])
        put(context, builder, kinds[0], out, at, [found])
        return
    halves = (chosen(builder, index, range(first, first + LANES)) for first in (0, LANES))
    values = [_looked_up(builder, table, builder.zext(half, _WHOLES)) for half in halves]
    put_rounded(context, builder, kinds[0], out, at, values)
