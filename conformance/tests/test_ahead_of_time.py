"""Facts of compiled kernels, for small kernels whose code is known."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")

pytestmark = pytest.mark.slow
TARGETS = pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))


@triton.jit
def copy(source, to, n, BLOCK):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at, mask=at < n), mask=at < n)


@triton.jit
def shares(source, to, BLOCK):
    at = tl.arange(0, BLOCK)
    a = tl.load(source + at)
    tl.store(to + at, a / tl.sum(a, 0))


def compiled(kernel, target, *arguments, warps=4, **constants):
    config = ahead_of_time.Config(warps)
    call = ahead_of_time.Call(kernel, arguments, constants, config)
    return ahead_of_time.compile_call(call, target)


@TARGETS
def test_an_aligned_copy_moves_16_bytes_at_a_time(target):
    code = compiled(copy, target, torch.empty(4096), torch.empty(4096), 4096, BLOCK=1024)
    assert set(code.loads) == set(code.stores) == {128}
    assert code.spills == 0
    assert 4 <= code.registers <= 40, "four values and two addresses at least"


@TARGETS
def test_an_unaligned_copy_moves_a_value_at_a_time(target):
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16), (torch.int8, 8)):
        source, to = (torch.empty(4097, dtype=dtype)[1:] for _ in range(2))
        code = compiled(copy, target, source, to, 4095, BLOCK=1024)
        assert set(code.loads) == set(code.stores) == {bits}, dtype


def test_spills_are_seen():
    """A thread holds 512 values until their sum is known, and has 255 registers at most."""
    x = torch.empty(32 * 512)
    assert compiled(shares, "sm_80", x, x, warps=1, BLOCK=32 * 512).spills >= 4 * (512 - 255)
