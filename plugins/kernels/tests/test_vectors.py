"""Operations on vectors give the same numbers on every processor, by its own instructions."""

import os
import platform
import subprocess
import sys
from functools import cache

import pytest
import torch

pytest.importorskip("numba")

ARITHMETIC = """
import numpy as np
from modulora_kernels.cpu import (
    as_shorts, jit, load, load_shorts, multiply_add, splat, store, sum_of_lanes, to_floats)

@jit(borrows=True)
def kernel(bytes_, signed, x, wholes, floats, shorts):
    a, b = load(bytes_, 3), load(signed, 5)
    store(wholes, 0, (a & 7 | a << 4) + (a >> 2) - b * 3)
    store(floats, 0, multiply_add(to_floats(b), load(x, 1), splat(np.float32(2))) * load(x, 2))
    store(shorts, 0, as_shorts(a | b << 16))
    store(shorts, 32, load_shorts(signed, 1) + 1)
    return sum_of_lanes(load(x, 0))

numbers = np.random.default_rng(0)
bytes_ = numbers.integers(0, 256, 64).astype(np.uint8)
signed = numbers.integers(-128, 128, 64).astype(np.int8)
x = numbers.integers(-99, 99, 32).astype(np.float32)
wholes, floats, shorts = np.zeros(16, np.int32), np.zeros(16, np.float32), np.zeros(64, np.int16)
total = kernel(bytes_, signed, x, wholes, floats, shorts)
a, b = bytes_[3:19].astype(np.int32), signed[5:21].astype(np.int32)
assert (wholes == (a & 7 | a << 4) + (a >> 2) - b * 3).all()
assert (floats == (b * x[1:17] + 2) * x[2:18]).all()
assert (shorts[:32:2] == a).all() and (shorts[1:32:2] == b | (a >> 16)).all()
assert (shorts[32:] == signed[1:33].astype(np.int16) + 1).all()
assert total == x[:16].sum()
print("vfmadd" in "".join(kernel.inspect_asm().values()))
"""

LOOKUP = """
import numpy as np
import torch
from modulora_kernels.cpu import (
    PAIR_ORDER, jit, load, lookup, lookup_pairs, store, store_lookup, table_for)
from modulora_kernels.cpu.vectors import load_shorts

@jit(borrows=True)
def kernel(table, index, out, pairs, two):
    store(out, 0, lookup(load(table, 0), load(index, 0)))
    a, b = lookup_pairs(load(table, 0), load(pairs, 0))
    store(two, 0, a)
    store(two, 16, b)

@jit(borrows=True)
def looked_up(table, codes, out):
    store_lookup(out, 1, table_for(out, load(table, 0)), load_shorts(codes, 0))

bits = torch.randint(-2**31, 2**31, (50, 16), generator=torch.Generator().manual_seed(0)).int()
bits[::3, 3:7] = torch.tensor([0x7F800001, -1, 1, 0x3F808000])  # NaN, NaN, subnormal, a half
for table in bits.view(torch.float32):
    index = torch.randint(-2**31, 2**31, (16,)).int()
    pairs = torch.randint(0, 256, (16,), dtype=torch.uint8)
    out, two = torch.empty(16), torch.empty(32)
    kernel(*(t.numpy() for t in (table, index, out, pairs, two)))
    assert torch.equal(out.view(torch.int32), table[(index & 15).long()].view(torch.int32))
    codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[list(PAIR_ORDER)]
    assert torch.equal(two.view(torch.int32), table[codes.long()].view(torch.int32))
    codes = torch.randint(-2**15, 2**15, (32,)).short()
    for dtype, stored in ((torch.float32, torch.float32), (torch.bfloat16, torch.int16)):
        out = torch.zeros(34, dtype=dtype)
        looked_up(table.numpy(), codes.numpy(), out.view(stored).numpy())
        expected = table[(codes & 15).long()].to(dtype)
        torch.testing.assert_close(out[1:33], expected, rtol=0, atol=0, equal_nan=True)
        assert out[0] == out[33] == 0
print("vperm" in "".join(kernel.inspect_asm().values()))
"""

ROUNDING = """
import numpy as np
import torch
from modulora_kernels.cpu import from_half, jit, load, narrow, store_rounded

@jit(borrows=True)
def kernel(x, out, one_by_one):
    for at in range(0, x.size, 32):
        store_rounded(out, at, load(x, at), load(x, at + 16))
    for k in range(x.size):
        one_by_one[k] = narrow(x[k], one_by_one[k])

@jit(borrows=True)
def widen(bits, out):
    for k in range(bits.size):
        out[k] = from_half(bits[k])

bits = torch.randint(-2**31, 2**31, (2**15,), generator=torch.Generator().manual_seed(0)).int()
bits[::997] = 0x7F800001  # a NaN that bf16 would make infinite
bits[1::991] = 0x00000001
bits[2::983] = 0x3F808000
for dtype, stored in ((torch.float32, torch.float32), (torch.bfloat16, torch.int16)):
    x = bits.view(torch.float32)
    both = torch.zeros(2, len(x), dtype=dtype)
    kernel(x.numpy(), *both.view(stored).numpy())
    torch.testing.assert_close(both, x.to(dtype).expand(2, -1), rtol=0, atol=0, equal_nan=True)
halves, out = torch.arange(-(2**15), 2**15, dtype=torch.int16), torch.empty(2**16)
widen(halves.numpy(), out.numpy())
expected = halves.view(torch.float16).float()
torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
assert torch.equal(out.signbit(), expected.signbit())
print("vcvtne2ps2bf16" in "".join(kernel.inspect_asm().values()))
"""


SCRIPTS = {
    "arithmetic": ARITHMETIC,
    "lookup": LOOKUP,
    "rounding": ROUNDING,
}

IMPORT_EACH = """
import importlib, sys, traceback
for name in sys.argv[1:]:
    print(name, end=" ", flush=True)
    try:
        importlib.import_module(name)
    except Exception:
        print("failed")
        traceback.print_exc()
"""

PLAIN, AVX2, NATIVE = ("x86-64", "+sse2"), ("haswell", "+sse4.2,+avx,+avx2,+fma"), ("", "")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """``printed(processor)``: lines of a process that runs all scripts with its instructions."""

    @cache
    def run(processor):
        folder = tmp_path_factory.mktemp("scripts")
        for name, script in SCRIPTS.items():
            (folder / f"{name}.py").write_text(script)  # numba reads a kernel's source
        named = {"NUMBA_CACHE_DIR": str(folder)}
        if processor != NATIVE:
            named |= {"NUMBA_CPU_NAME": processor[0], "NUMBA_CPU_FEATURES": processor[1]}
        words, environment = [sys.executable, "-c", IMPORT_EACH, *SCRIPTS], {**os.environ, **named}
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        return [*done.stdout.splitlines(), done.stderr]

    return run


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize(
    "processor",
    [
        pytest.param(PLAIN, id="SSE2", marks=pytest.mark.slow),
        pytest.param(AVX2, id="AVX2", marks=pytest.mark.slow),
        pytest.param(NATIVE, id="this one"),
    ],
)
@pytest.mark.parametrize(
    ("script", "has_instruction"),
    [
        ("arithmetic", {PLAIN: False, AVX2: True, NATIVE: torch.cpu._is_avx2_supported()}),
        ("lookup", {PLAIN: False, AVX2: True, NATIVE: torch.cpu._is_avx2_supported()}),
        ("rounding", {PLAIN: False, AVX2: False, NATIVE: torch.cpu._is_avx512_bf16_supported()}),
    ],
    ids=SCRIPTS,
)
def test_every_processor_finds_the_same(script, has_instruction, processor, printed):
    if processor == AVX2 and not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")
    lines = printed(processor)
    assert f"{script} {has_instruction[processor]}" in lines, lines
