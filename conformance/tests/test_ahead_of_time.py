"""What is read from compiled kernels, against small kernels whose code is known, and against NVIDIA's own reader."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")

TARGETS = pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))


@triton.jit
def copy(source, to, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at, mask=at < n), mask=at < n)


@triton.jit
def twice_a_table(table, index, to, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    i = tl.load(index + at).to(tl.int32)
    tl.store(to + at, tl.load(table + i) + tl.load(table + 16 + i))


@triton.jit
def shares(source, to, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(source + at)
    total = tl.sum(a, 0)
    tl.store(to + at, a / total)


def compile_copy(target, dtype, divisible, block=1024):
    signature = {"source": f"*{dtype}", "to": f"*{dtype}", "n": "i32"}
    return ahead_of_time.compile_kernel(
        copy, signature, {"BLOCK": block}, target, divisible=divisible
    )


def compile_shares():
    given = {"source": "*fp32", "to": "*fp32"}, {"BLOCK": 32 * 512}, "sm_80"
    return ahead_of_time.compile_kernel(shares, *given, divisible=[(0,), (1,)], warps=1)


@TARGETS
def test_an_aligned_copy_moves_16_bytes_at_a_time(target):
    code = compile_copy(target, "fp32", [(0,), (1,), (2,)])
    assert set(code.loads) == set(code.stores) == {128}
    assert code.spills == 0
    assert 4 <= code.registers <= 40, "four values and two addresses at least"


@TARGETS
def test_a_copy_of_unknown_alignment_moves_a_value_at_a_time(target):
    for dtype, bits in (("fp32", 32), ("bf16", 16), ("i8", 8)):
        code = compile_copy(target, dtype, [])
        assert set(code.loads) == set(code.stores) == {bits}, dtype


def test_every_lookup_is_counted():
    signature = {"table": "*fp32", "index": "*u8", "to": "*fp32"}
    for target, threads in (("sm_90", 128), ("gfx942", 256)):
        code = ahead_of_time.compile_kernel(
            twice_a_table, signature, {"BLOCK": 4 * threads}, target, divisible=[(0,), (1,), (2,)]
        )
        assert code.loads == {32: 8 + 1}, (
            "two for each of four values of a thread, and their four indices at once"
        )
        assert code.stores == {128: 1}


def test_spills_are_seen():
    """A thread holds 512 values until their sum is known, and has 255 registers at most."""
    assert compile_shares().spills >= 4 * (512 - 255)


@pytest.mark.parametrize("kernel", [copy, shares], ids=["copy", "spills"])
def test_registers_are_those_that_cuobjdump_prints(kernel, tmp_path, monkeypatch):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this build of triton brings no cuobjdump")
    read, cubins = ahead_of_time._read, []
    monkeypatch.setattr(
        ahead_of_time,
        "_read",
        lambda built, target: cubins.append(built.asm["cubin"]) or read(built, target),
    )
    code = compile_copy("sm_80", "fp32", [(0,), (1,)]) if kernel is copy else compile_shares()
    (tmp_path / "kernel.cubin").write_bytes(cubins[0])
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"REG:(\d+) STACK:(\d+)", printed) == [
        (str(code.registers), str(code.spills))
    ]


def test_a_recorded_call_is_compiled_with_its_types_and_alignments():
    whole = torch.empty(2**12 + 1)
    for source, n, expected in (
        (whole[:-1], 2**12, 128),
        (whole[1:], 2**12, 32),
        (whole[:-1], 2**12 - 1, 32),
    ):
        call = ahead_of_time.Call(
            copy, (source, torch.empty(2**12), n), {"BLOCK": 1024}, ahead_of_time.Config()
        )
        assert set(ahead_of_time.compile_call(call, "sm_90").loads) == {expected}


def test_an_unknown_target_is_refused():
    with pytest.raises(KeyError):
        compile_copy("sm_20", "fp32", [])
