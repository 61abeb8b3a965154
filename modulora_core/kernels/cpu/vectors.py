"""Vectors in kernels that numba compiles: what LLVM doesn't find by itself is spelled here, in terms that any processor has.

What an intrinsic begins with, a plugin's own or the core's (:mod:`modulora_core.kernels.cpu.product_loops`): :func:`splat`,
:func:`chosen`, :func:`lookup`, :func:`call`, :func:`matrix`, :func:`pointer`, :func:`has`, :func:`zeros`, :func:`multiply_add`,
:func:`loops`, :func:`sum_of_lanes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba.core import cgutils

LANES = 16
"""Values that are multiplied at once; the processor's registers may be half or a quarter of that."""

_FLOAT, _LANE, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)

binding.initialize_native_asmparser()  # for an instruction by its name: without it LLVM ends the process


def has(context: Any, feature: str) -> bool:
    """Whether code is generated for a processor with ``feature``, in LLVM's words, such as ``"avx2"``."""
    return f"+{feature}" in str(context.codegen().magic_tuple()[2])


def matrix(context: Any, builder: Any, kind: Any, array: Any) -> tuple[Any, Any]:
    """Where a C-contiguous array begins, and the length of its last dimension."""
    made = context.make_array(kind)(context, builder, array)
    return made.data, cgutils.unpack_tuple(builder, made.shape, kind.ndim)[-1]


def pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, of: ir.Type) -> Any:
    """To ``array[index]``, of a C-contiguous array as if it were flat, as a pointer to ``of``."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), of.as_pointer())


def splat(builder: Any, value: Any, of: ir.VectorType) -> Any:
    """A vector whose lanes are all ``value``."""
    one = builder.insert_element(ir.Constant(of, ir.Undefined), value, _LANE(0))
    return chosen(builder, one, [0] * of.count)


def lookup(context: Any, builder: Any, table: Any, index: Any) -> Any:
    """``table[index & 15]``, a lane at a time: ``<16 x float>`` by ``<16 x i32>``.

    LLVM doesn't find the lookup in registers by itself, so it is spelled for AVX-512 and AVX2. Elsewhere each lane loads its value.
    """
    if has(context, "avx512f"):
        return call(builder, "llvm.x86.avx512.permvar.sf.512", table.type, [table, index])
    if has(context, "avx2"):
        return _lookup_by_eights(builder, table, index)
    if isinstance(table, ir.Constant):
        place = cgutils.global_constant(builder, "table", table)
    else:
        place = cgutils.alloca_once(builder, table.type)
        builder.store(table, place)
    values = builder.bitcast(place, _FLOAT.as_pointer())
    found = ir.Constant(_VECTOR, ir.Undefined)
    for lane in range(LANES):
        at = builder.and_(builder.extract_element(index, _LANE(lane)), _LANE(LANES - 1))
        found = builder.insert_element(found, builder.load(builder.gep(values, [at])), _LANE(lane))
    return found


def chosen(builder: Any, vector: Any, lanes: Iterable[int]) -> Any:
    """A vector of these lanes of one."""
    numbers = list(lanes)
    mask = ir.Constant(ir.VectorType(_LANE, len(numbers)), numbers)
    return builder.shuffle_vector(vector, vector, mask)


def _lookup_by_eights(builder: Any, table: Any, index: Any) -> Any:
    """By AVX2's, which is of eight values by the low three bits: two of them, and a choice by the fourth, which is made a sign for it."""
    tables = [chosen(builder, table, range(first, first + 8)) for first in (0, 8)]
    found = []
    for first in (0, 8):
        eight = chosen(builder, index, range(first, first + 8))
        low, high = (call(builder, "llvm.x86.avx2.permps", of.type, [of, eight]) for of in tables)
        fourth = builder.shl(eight, ir.Constant(eight.type, [28] * eight.type.count))
        choice = [low, high, builder.bitcast(fourth, low.type)]
        found.append(call(builder, "llvm.x86.avx.blendv.ps.256", low.type, choice))
    return builder.shuffle_vector(
        *found, ir.Constant(ir.VectorType(_LANE, LANES), list(range(LANES)))
    )


def call(builder: Any, name: str, of: ir.Type, operands: list[Any]) -> Any:
    """What one of LLVM's functions gives, most of which are an instruction of the processor."""
    kind = ir.FunctionType(of, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def assembly(builder: Any, code: str, of: ir.Type, operands: list[Any], constraints: str) -> Any:
    """What an instruction of the processor gives, by its name: LLVM's names for new ones differ between its versions."""
    kind = ir.FunctionType(of, [operand.type for operand in operands])
    return builder.asm(kind, code, constraints, operands, False)


def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> None:
    """``total += a · b`` for an alloca, which LLVM makes a register; rounded once where the processor can."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


def zeros(builder: Any, count: int, lanes: int = LANES, number: ir.Type = _FLOAT) -> list[Any]:
    """So many sums of sixteen lanes each, or fewer, as allocas, set to 0 where this stands."""
    of = ir.VectorType(number, lanes)
    totals = [cgutils.alloca_once(builder, of) for _ in range(count)]
    for total in totals:  # an alloca is made where the function begins, and this may be in a loop
        builder.store(ir.Constant(of, [0.0] * lanes), total)
    return totals


def sum_of_lanes(builder: Any, value: Any) -> Any:
    """Of sixteen or another power of two, by halves: in one order on every processor."""
    width = value.type.count // 2
    while width:
        low, high = (chosen(builder, value, range(first, first + width)) for first in (0, width))
        value = builder.fadd(low, high)
        width //= 2
    return builder.extract_element(value, _LANE(0))


def loops(builder: Any, count: Any, most: int) -> Iterator[tuple[int, Any]]:
    """A loop over ``most`` at a time of ``count``, and one over the rest: how many at a time, and the first of them."""
    done = _INDEX(0)
    for width in sorted({most, 1}, reverse=True):
        times = builder.sdiv(builder.sub(count, done), _INDEX(width))
        with cgutils.for_range(builder, times) as loop:
            yield width, builder.add(done, builder.mul(loop.index, _INDEX(width)))
        done = builder.add(done, builder.mul(times, _INDEX(width)))
