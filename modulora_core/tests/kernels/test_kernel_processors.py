"""What is spelled for some processors, on others: looking up in tables, rounding to bf16 and fp16, multiplying, asking for bytes ahead."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

LOOK_UP = """
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.vectors import LANES, lookup, pointer

FLOATS, WHOLES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

@intrinsic
def look_up(_context, table, index, out):
    def generate(context, builder, signature, arguments):
        places = [pointer(context, builder, kind, array, ir.IntType(64)(0), of)
                  for kind, array, of in zip(signature.args, arguments, (FLOATS, WHOLES, FLOATS))]
        table, index = (builder.load(place, align=4) for place in places[:2])
        builder.store(lookup(context, builder, table, index), places[2], align=4)
        return context.get_dummy_value()
    return types.void(table, index, out), generate

@jit()
def kernel(table, index, out):
    look_up(table, index, out)

numbers = np.random.default_rng(0)
for _ in range(20):
    table, index = numbers.standard_normal(16).astype(np.float32), numbers.integers(-2**31, 2**31, 16).astype(np.int32)
    out = np.full(16, np.nan, np.float32)
    kernel(table, index, out)
    assert (out == table[index & 15]).all(), (table, index, out)
print("vperm" in "".join(kernel.inspect_asm().values()))
"""


ROUND = """
import numpy as np
import torch
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.conversions import narrow_row

@jit()
def kernel(numbers, out):
    narrow_row(numbers, out)

bits = torch.randint(-2**31, 2**31, (999, 67), generator=torch.Generator().manual_seed(0)).to(torch.int32)
special = torch.tensor([0x7F800001, -1, 1, 0x3F808000])  # NaN of both kinds, a subnormal number, a half
bits[::3, 3:7] = bits[1::3, 20:24] = bits[::2, 63:] = special
for row in bits.view(torch.float32):
    out = torch.zeros(67, dtype=torch.bfloat16)
    kernel(row.numpy(), out.view(torch.int16).numpy())
    torch.testing.assert_close(out, row.bfloat16(), rtol=0, atol=0, equal_nan=True)
print("vcvtne2ps2bf16" in "".join(kernel.inspect_asm().values()))
"""

HALVES = """
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.conversions import from_half, halves_to_floats, through_half, through_halves
from modulora_core.kernels.cpu.vectors import LANES, pointer

def of_vectors(convert, source):
    @intrinsic
    def put(_context, x, _at, out):
        def generate(context, builder, signature, arguments):
            x, at, out = arguments
            places = [pointer(context, builder, kind, array, at, ir.VectorType(of, LANES))
                      for kind, array, of in ((signature.args[0], x, source), (signature.args[2], out, ir.FloatType()))]
            builder.store(convert(context, builder, builder.load(places[0], align=2)), places[1], align=4)
            return context.get_dummy_value()
        return types.void(x, types.int64, out), generate
    return put

round_vector, widen_vector = of_vectors(through_halves, ir.FloatType()), of_vectors(halves_to_floats, ir.IntType(16))

def both_ways(of_vector, of_one):
    @jit()
    def kernel(x, out, one_by_one):
        for at in range(0, x.size, LANES):
            of_vector(x, at, out)
        for k in range(x.size):
            one_by_one[k] = of_one(x[k])
    return kernel

kernel, widen = both_ways(round_vector, through_half), both_ways(widen_vector, from_half)
bits = np.arange(-2**15, 2**15).astype(np.int16)  # all there are, NaN and infinities too
out, one_by_one = (np.zeros(bits.size, np.float32) for _ in range(2))
widen(bits, out, one_by_one)
expected = bits.view(np.float16).astype(np.float32)
for found in (out, one_by_one):
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == np.signbit(expected)).all()

bits = np.random.default_rng(0).integers(0, 2**32, 2**20, np.uint32)
halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # and what is in the midst of two, a bit to either side
middles = ((halves[1:] + halves[:-1]) / 2).view(np.int32)
x = np.concatenate([bits.view(np.float32), halves, -halves, *((middles + np.int32(d)).view(np.float32) for d in (-1, 0, 1))])
x = x[np.abs(x) < 65520]  # nor NaN
x = np.concatenate([x, np.zeros(-x.size % LANES, np.float32)])
out, one_by_one = np.full_like(x, np.nan), np.full_like(x, np.nan)
kernel(x, out, one_by_one)
expected = x.astype(np.float16).astype(np.float32)
assert (out == expected).all() and (one_by_one == expected).all()
print("vcvtps2ph" in "".join(kernel.inspect_asm().values()))
"""

MULTIPLY = """
import numpy as np
import torch
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.product_loops import add_products_of_four, add_rows_of_four

@jit()
def kernel(x, w, forward, transposed):
    add_products_of_four(x, 0, 0, w, 0, 0, x.shape[1], forward)
    add_rows_of_four(x, 0, 0, len(w), w, 0, w.shape[1], transposed, 0, 0)

generator = torch.Generator().manual_seed(0)
for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float32, torch.float32)):
    x, w = (torch.randn(4, 96, generator=generator).to(dtype) for _ in range(2))
    forward, transposed = torch.zeros(4, 4), torch.ones(4, 96)
    kernel(*(a.view(bits).numpy() for a in (x, w)), forward.numpy(), transposed.numpy())
    torch.testing.assert_close(forward.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transposed.double(), 1 + x[:, :4].double() @ w.double(), rtol=1e-5, atol=1e-5)
print("vdpbf16ps" in "".join(kernel.inspect_asm().values()))
"""

BLOCKS = """
import numpy as np
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.block_loops import ROW, add_block, block_columns, block_rows, put_transposed, square

@jit()
def sizes():
    return block_rows(), block_columns(), square()

@jit()
def kernel(a, b, depth, c, turned):
    add_block(a, 1, 3, b, 2, 4, depth, c, 1, 5, a, 0, 7)
    put_transposed(b, 1, 2, turned, 3, 4)

tall, wide, side = sizes()
numbers = np.random.default_rng(0)
a, b = (numbers.standard_normal(shape).astype(np.float32) for shape in ((tall + 1, ROW), (60, wide + 4)))
for depth in (0, 1, 41):
    c, turned = np.ones((tall + 2, wide + 7), np.float32), np.zeros((side + 3, side + 4), np.float32)
    kernel(a, b, depth, c, turned)
    expected = np.ones(c.shape)
    expected[1 : 1 + tall, 5 : 5 + wide] += a[1:, 3 : 3 + depth].astype(np.float64) @ b[2 : 2 + depth, 4:]
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-5)
    assert (turned[3:, 4:] == b[1 : 1 + side, 2 : 2 + side].T).all() and not turned[:3].any() and not turned[:, :4].any()
print("vfmadd" in "".join(kernel.inspect_asm().values()))
"""

READ_AHEAD = """
import mmap
import numpy as np
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.prefetch import AHEAD, read_ahead

@jit()
def kernel(array, first, count):
    read_ahead(array, first, count)
    return array[first]

numbers = np.frombuffer(mmap.mmap(-1, 4 * AHEAD), np.int16)
last = numbers.size - 1
for first, count in ((0, 100), (last, 1), (last - AHEAD // 2, 10**6), (0, 0), (0, numbers.size)):  # within, at the end, beyond it
    assert kernel(numbers, first, count) == numbers[first]
print("prefetch" in "".join(kernel.inspect_asm().values()))
"""

TABLE = """
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.tables import Table
from modulora_core.kernels.cpu.vectors import LANES, pointer

def put(vectors):
    @intrinsic
    def put(_context, numbers, codes, out):
        def generate(context, builder, signature, arguments):
            kinds = signature.args
            here = pointer(context, builder, kinds[0], arguments[0], ir.IntType(64)(0), ir.VectorType(ir.FloatType(), LANES))
            table = Table(context, builder, kinds[2], builder.load(here, align=4))
            for first in range(0, vectors, table.at_once):
                at, count = ir.IntType(64)(first * LANES), min(table.at_once, vectors - first) * LANES
                place = pointer(context, builder, kinds[1], arguments[1], at, ir.VectorType(ir.IntType(8), count))
                table.put(arguments[2], at, builder.zext(builder.load(place, align=1), ir.VectorType(table.index, count)))
            return context.get_dummy_value()
        return types.void(numbers, codes, out), generate

    @jit()
    def kernel(numbers, codes, out):
        put(numbers, codes, out)
    return kernel

bits = torch.randint(-2**31, 2**31, (200, 16), generator=torch.Generator().manual_seed(0)).to(torch.int32)
bits[::3, 3:7] = torch.tensor([0x7F800001, -1, 1, 0x3F808000])  # NaN of both kinds, a subnormal number, a half
for vectors in (1, 2, 3):
    kernel = put(vectors)
    for numbers in bits.view(torch.float32):
        codes = torch.randint(0, 256, (vectors * LANES,), dtype=torch.uint8)  # all but four bits are somebody else's
        for dtype, stored in ((torch.float32, torch.float32), (torch.bfloat16, torch.int16)):
            out = torch.zeros(vectors * LANES, dtype=dtype)
            kernel(numbers.numpy(), codes.numpy(), out.view(stored).numpy())
            expected = numbers[(codes & 15).long()].to(dtype)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
print("vpermw" in "".join(kernel.inspect_asm().values()))
"""

PLAIN, AVX2 = ("x86-64", "+sse2"), ("haswell", "+sse4.2,+avx,+avx2,+fma")
NATIVE = ("", "")  # as numba finds it


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize(
    ("kernel", "processor", "by_instruction"),
    [
        (LOOK_UP, PLAIN, False),
        (LOOK_UP, AVX2, True),
        (ROUND, PLAIN, False),
        (ROUND, AVX2, False),
        (ROUND, NATIVE, torch.cpu._is_avx512_bf16_supported()),
        (TABLE, PLAIN, False),
        (TABLE, AVX2, False),
        (TABLE, NATIVE, torch.cpu._is_avx512_supported()),
        (HALVES, PLAIN, False),
        (HALVES, AVX2, False),
        (HALVES, NATIVE, torch.cpu._is_avx2_supported()),  # a processor with AVX2 has F16C too
        (MULTIPLY, PLAIN, False),
        (MULTIPLY, AVX2, False),
        (MULTIPLY, NATIVE, torch.cpu._is_avx512_bf16_supported()),
        (BLOCKS, PLAIN, False),
        (BLOCKS, AVX2, True),
        (BLOCKS, NATIVE, torch.cpu._is_avx2_supported()),
        (READ_AHEAD, PLAIN, True),
        (READ_AHEAD, NATIVE, True),
    ],
    ids=[
        "look up, SSE2",
        "look up, AVX2",
        "round, SSE2",
        "round, AVX2",
        "round, this one",
        "table, SSE2",
        "table, AVX2",
        "table, this one",
        "halves, SSE2",
        "halves, AVX2",
        "halves, this one",
        "multiply, SSE2",
        "multiply, AVX2",
        "multiply, this one",
        "blocks, SSE2",
        "blocks, AVX2",
        "blocks, this one",
        "ahead, SSE2",
        "ahead, this one",
    ],
)
def test_every_processor_finds_the_same(
    kernel: str, processor: tuple[str, str], by_instruction: bool, tmp_path: Path
) -> None:
    if processor == AVX2 and not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")
    name, features = processor
    named = {"NUMBA_CACHE_DIR": str(tmp_path)}
    if processor != NATIVE:
        named |= {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    script = tmp_path / "script.py"  # numba reads a kernel's source
    script.write_text(kernel)
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **named}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(by_instruction), done.stderr
