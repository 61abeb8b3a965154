"""Looking up in a table of sixteen, on processors with and without the instructions for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

SCRIPT = """
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from modulora_core.kernels import jit
from modulora_core.kernels.vectors import LANES, lookup, pointer

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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize(
    ("processor", "features", "by_instruction"),
    [("x86-64", "+sse2", False), ("haswell", "+sse4.2,+avx,+avx2,+fma", True)],
)
def test_every_processor_finds_the_same(
    processor: str, features: str, by_instruction: bool, tmp_path: Path
) -> None:
    if by_instruction and not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")
    named = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "look_up.py"  # numba reads a kernel's source
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **named}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(by_instruction), done.stderr
