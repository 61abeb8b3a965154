"""Vectors as values of numba functions: a kernel is a loop over vectors.

    Floats      16 fp32 numbers
    Wholes      16 whole numbers, int32
    Shorts      32 whole numbers, int16

``+ - *`` are defined for two vectors of a kind, or a vector and a number, and so are ``& | << >>``
of whole numbers; ``>>`` fills with zeros. An array is C-contiguous and indexed as if it were flat,
without bounds checks. An int16 array of numbers holds the bits of bf16.

    total = multiply_add(load(x, at), load(y, at), total)
"""

# ruff: noqa: PLW0108 - numba counts the arguments of a lambda

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

binding.initialize_native_asmparser()  # LLVM ends the process at an unknown instruction's name


def has(feature: str) -> bool:
    """Whether kernels are compiled for a ``feature``, in LLVM's words: ``"avx2"``."""
    return f"+{feature}" in str(cpu_target.target_context.codegen().magic_tuple()[2])


LANES = 16
"""Numbers of a vector."""


class Vector(types.Type):
    """numba's type of a vector: ``count`` times ``number``, a numba type."""

    def __init__(self, number, count):
        self.number, self.count = number, count
        super().__init__(name=f"Vector({count} x {number})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        number = manager[kind.number].get_value_type()
        super().__init__(manager, kind, ir.VectorType(number, kind.count))


Floats, Wholes = Vector(types.float32, LANES), Vector(types.int32, LANES)
Shorts = Vector(types.int16, 2 * LANES)

_I64 = types.int64
FLOAT, INT, INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WHOLES = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)


# for operations: those below, and a kernel's own


def operation(kinds: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that generates LLVM code as an operation of numba functions.

    ``generate(context, builder, kinds, *values)`` gives the operation's value, or None if it has
    none. ``kinds`` are numba's types of ``values``.

    Args:
        kinds: ``kinds(*types)`` gives the operation's numba signature for the types of its
            arguments.
    """

    def decorate(generate: Callable[..., Any]) -> Any:
        def typed(_context, *arguments):
            def lower(context, builder, signature, values):
                made = generate(context, builder, signature.args, *values)
                return context.get_dummy_value() if made is None else made

            return kinds(*arguments), lower

        typed.__name__, typed.__doc__ = generate.__name__, generate.__doc__
        names = ["_context", *inspect.signature(kinds).parameters]
        one = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, one) for name in names])
        typed.__signature__ = signature  # type: ignore[attr-defined]  # numba counts arguments
        return intrinsic(typed)

    return decorate


def place(context: Any, builder: Any, kind: Any, array: Any, at: Any, of: ir.Type) -> Any:
    """A pointer to ``array[at]`` as LLVM's type ``of``; numba's type of the array is ``kind``."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), of.as_pointer())


def put(context: Any, builder: Any, kind: Any, array: Any, at: Any, values: list[Any]) -> None:
    """Store vectors of 16 numbers, one after another, from ``array[at]`` on."""
    for k, value in enumerate(values):
        here = builder.add(at, INDEX(k * LANES))
        builder.store(value, place(context, builder, kind, array, here, value.type), align=1)


def chosen(builder: Any, vector: Any, lanes: Iterable[int], other: Any = None) -> Any:
    """A vector of lanes of ``vector``; an index beyond its last lane is a lane of ``other``."""
    numbers = list(lanes)
    mask = ir.Constant(ir.VectorType(INT, len(numbers)), numbers)
    return builder.shuffle_vector(vector, vector if other is None else other, mask)


def same(builder: Any, value: Any, of: ir.VectorType) -> Any:
    """A vector whose lanes are all ``value``."""
    one = builder.insert_element(ir.Constant(of, ir.Undefined), value, INT(0))
    return chosen(builder, one, [0] * of.count)


def call(builder: Any, name: str, of: ir.Type, operands: list[Any]) -> Any:
    """Call one of LLVM's functions, most of which are an instruction of the processor."""
    kind = ir.FunctionType(of, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def instruction(builder: Any, code: str, of: ir.Type, operands: list[Any], where: str) -> Any:
    """An instruction of the processor by its name: LLVM's names differ between its versions."""
    kind = ir.FunctionType(of, [operand.type for operand in operands])
    return builder.asm(kind, code, where, operands, False)


def llvm(kind: Vector) -> Any:
    """LLVM's type of a vector."""
    return cpu_target.target_context.get_value_type(kind)


def constant(of: ir.VectorType, number: float) -> Any:
    return ir.Constant(of, [number] * of.count)


# arithmetic


def _define(symbol: Any, of_floats: str, of_wholes: str) -> None:
    @type_callable(symbol)
    def _typing(_context):
        def typer(a, b):
            is_number = isinstance(b, types.Integer | types.Float)
            return a if isinstance(a, Vector) and (a == b or is_number) else None

        return typer

    def lower(context, builder, signature, values):
        (a, b), (kind, second) = values, signature.args
        if not isinstance(second, Vector):
            b = same(builder, context.cast(builder, b, second, kind.number), a.type)
        name = of_floats if kind.number is types.float32 else of_wholes
        return getattr(builder, name)(a, b)

    for second in (Vector, types.Integer, types.Float):
        lower_builtin(symbol, Vector, second)(lower)


for _names in (
    (operator.add, "fadd", "add"), (operator.sub, "fsub", "sub"), (operator.mul, "fmul", "mul"),
    (operator.and_, "", "and_"), (operator.or_, "", "or_"), (operator.lshift, "", "shl"),
    (operator.rshift, "", "lshr"),
):  # fmt: skip
    _define(*_names)


@operation(lambda number: (Floats if isinstance(number, types.Float) else Wholes)(number))
def splat(context, builder, kinds, number):
    """``(number)``: 16 times a number."""
    kind = Floats if isinstance(kinds[0], types.Float) else Wholes
    return same(builder, context.cast(builder, number, kinds[0], kind.number), llvm(kind))


@operation(lambda wholes: Floats(wholes))
def to_floats(_context, builder, _kinds, wholes):
    """``(wholes)``: the same numbers in fp32."""
    return builder.sitofp(wholes, _FLOATS)


@operation(lambda wholes: Shorts(wholes))
def as_shorts(_context, builder, _kinds, wholes):
    """``(wholes)``: the low 16 bits, then the high 16 bits, of each whole number."""
    return builder.bitcast(wholes, _SHORTS)


@operation(lambda a, b, total: total(a, b, total))
def multiply_add(_context, builder, _kinds, a, b, total):
    """``(a, b, total)``: ``a * b + total``, rounded once if the processor can.

    Of :data:`Pairs`: adds the products of both numbers of each pair."""
    return multiplied(builder, a, b, total)


def multiplied(builder, a, b, total):
    if a.type == total.type:
        product = builder.fmul(a, b, flags=("contract",))
        return builder.fadd(total, product, flags=("contract",))
    of = ir.VectorType(INT, total.type.count)
    pairs = [builder.bitcast(v, of) for v in (a, b)]
    if has("avx512bf16"):  # subnormal numbers count as 0
        where = "=v,0,v,v"
        return instruction(builder, "vdpbf16ps $3, $2, $0", total.type, [total, *pairs], where)
    for half, by in ((builder.shl, 16), (builder.and_, 0xFFFF0000)):
        x, y = (builder.bitcast(half(v, constant(of, by)), total.type) for v in pairs)
        total = multiplied(builder, x, y, total)
    return total


@operation(lambda vector: vector.number(vector))
def sum_of_lanes(_context, builder, _kinds, vector):
    """``(vector)``: the sum of the numbers, by halves: in one order on every processor."""
    width = vector.type.count // 2
    while width:
        halves = (chosen(builder, vector, range(at, at + width)) for at in (0, width))
        vector, width = builder.fadd(*halves), width // 2
    return builder.extract_element(vector, INT(0))


# memory


def _loader(kind_of: Callable[[Any], Vector], doc: str) -> Any:
    @operation(lambda array, _at: kind_of(array)(array, _I64))
    def loaded(context, builder, kinds, array, at):
        of, stored = llvm(kind_of(kinds[0])), context.get_data_type(kinds[0].dtype)
        source = ir.VectorType(stored, of.count)
        values = builder.load(place(context, builder, kinds[0], array, at, source), align=1)
        if stored == of.element:
            return values
        return (builder.sext if kinds[0].dtype.signed else builder.zext)(values, of)

    loaded.__doc__ = doc
    return loaded


load = _loader(
    lambda array: Floats if array.dtype is types.float32 else Wholes,
    "``(array, at)``: 16 fp32 or whole numbers.",
)
load_shorts = _loader(lambda _: Shorts, "``(array, at)``: 32 whole numbers of at most 16 bits.")


@operation(lambda array, _at, vector: types.void(array, _I64, vector))
def store(context, builder, kinds, array, at, vector):
    """``(array, at, vector)``: store a vector's numbers as they are."""
    put(context, builder, kinds[0], array, at, [vector])


@operation(lambda out, _at, a, b: types.void(out, _I64, a, b))
def store_rounded(context, builder, kinds, out, at, a, b):
    """``(out, at, a, b)``: store 32 fp32 numbers, rounded to bf16 if ``out`` is int16."""
    put_rounded(context, builder, kinds[0], out, at, [a, b])


def put_rounded(context: Any, builder: Any, kind: Any, out: Any, at: Any, two: list[Any]) -> None:
    if kind.dtype is types.float32:
        put(context, builder, kind, out, at, two)
    elif not (has("avx512bf16") and has("avx512dq")):
        put(context, builder, kind, out, at, [bf16_bits(builder, values) for values in two])
    else:
        # the instruction flushes subnormal numbers and keeps a NaN's bits; rare
        code = "vcvtne2ps2bf16 $2, $1, $0"
        both = instruction(builder, code, _SHORTS, two[::-1], "=v,v,v")
        put(context, builder, kind, out, at, [both])
        with builder.if_then(builder.or_(*(_is_special(builder, v) for v in two)), likely=False):
            put(context, builder, kind, out, at, [bf16_bits(builder, values) for values in two])


def _is_special(builder, numbers):
    """Whether a lane is a NaN or subnormal."""
    quiet_nan, subnormal, signalling_nan = 0x01, 0x20, 0x80
    bits, mask = ir.VectorType(ir.IntType(1), LANES), ir.IntType(16)
    classes = [numbers, INT(quiet_nan | subnormal | signalling_nan)]
    found = call(builder, "llvm.x86.avx512.fpclass.ps.512", bits, classes)
    return builder.icmp_unsigned("!=", builder.bitcast(found, mask), mask(0))


def bf16_bits(builder, numbers):
    """The bits in bf16 of fp32 numbers: to nearest, halves to even, and one NaN for all."""
    of = ir.VectorType(INT, numbers.type.count)
    bits = builder.bitcast(numbers, of)
    is_odd = builder.and_(builder.lshr(bits, constant(of, 16)), constant(of, 1))
    nearest = builder.add(bits, builder.add(is_odd, constant(of, 0x7FFF)))
    is_number = builder.fcmp_ordered("==", numbers, numbers)
    rounded = builder.select(is_number, nearest, constant(of, 0x7FC00000))
    half = ir.VectorType(ir.IntType(16), of.count)
    return builder.trunc(builder.lshr(rounded, constant(of, 16)), half)


@operation(lambda array, _at: types.void(array, _I64))
def prefetch(context, builder, kinds, array, at):
    """``(array, at)``: load the cache line of ``array[at]``, which may lie outside of the array."""
    line = place(context, builder, kinds[0], array, at, ir.IntType(8))
    to_read, to_all_caches, data = INT(0), INT(3), INT(1)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [line, to_read, to_all_caches, data])


@operation(lambda array: types.int64(array))
def size_of(context, _builder, kinds, _array):
    """``(array)``: bytes of an element, a constant; ``array.itemsize`` is a variable to numba."""
    return INDEX(context.get_abi_sizeof(context.get_data_type(kinds[0].dtype)))
