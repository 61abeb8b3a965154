"""Eight fp32 numbers as one value in kernels that numba compiles: a code's point, on whatever vector registers the processor has.

LLVM's own vectorizer finds no loop to vectorize in eight coordinates at a time. Here they are an LLVM vector, and the functions below
are its instructions. ``array`` is always C-contiguous fp32 of any shape, ``at`` an index into it as if it were flat, and
nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.extending import intrinsic, models, register_model

_EIGHT = ir.VectorType(ir.FloatType(), 8)
_LANES = ir.VectorType(ir.IntType(32), 8)


class Eight(types.Type):
    """The type in numba of eight fp32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Eight")


eight = Eight()


@register_model(Eight)
class _EightModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _EIGHT)


def _at(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index])


def _spread(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_EIGHT, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(_LANES, [0] * 8))


@intrinsic
def load(_context: Any, array: Any, _index: Any) -> Any:
    """``load(array, at)`` is ``array[at : at + 8]``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _at(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(pointer, _EIGHT.as_pointer()), align=4)

    return eight(array, types.intp), generate


@intrinsic
def store(_context: Any, array: Any, _index: Any, value: Any) -> Any:
    """``store(array, at, value)``: ``array[at : at + 8] = value``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, value = arguments
        pointer = _at(context, builder, signature.args[0], array, at)
        builder.store(value, builder.bitcast(pointer, _EIGHT.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def spread(_context: Any, _number: Any) -> Any:
    """The number, eight times."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0])

    return eight(types.float32), generate


@intrinsic
def add(_context: Any, a: Any, b: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return eight(a, b), generate


@intrinsic
def multiply(_context: Any, a: Any, b: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return eight(a, b), generate


@intrinsic
def multiply_add(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a · b + c``, rounded once where the processor can, twice elsewhere."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    return eight(a, b, c), generate


@intrinsic
def total(_context: Any, a: Any) -> Any:
    """The sum of the eight, by halves: in one order on every processor."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        for width in (4, 2, 1):
            lanes = ir.VectorType(ir.IntType(32), width)
            low, high = (
                builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(start, start + width))))
                for start in (0, width)
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.IntType(32)(0))

    return types.float32(a), generate
