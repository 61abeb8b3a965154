"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

from pathlib import Path

import pytest
import torch
from modulora_conformance.interpreted_kernels import run_interpreted

from modulora_core.packed import PackedWeight

pytest.importorskip("triton")
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")

pytestmark = pytest.mark.slow

TARGETS = pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "gfx942": 64}
"""KiB of shared memory that a program may have."""
N = 4096


def test_interpreted_kernels_give_the_values_of_the_definition():
    run_interpreted(Path(__file__).with_name("check_quip_interpreted.py"))


def compiled(target, launch):
    """The kernels of ``launch``, without spills and within shared memory."""
    found = ahead_of_time.compile_launches(launch, target)
    assert all(code.spills == 0 for code in found)
    assert all(code.shared <= 1024 * SHARED[target] for code in found)
    return found


def weight(bits):
    """Codes of an ordinary size, whose values nothing reads."""
    held = {"codes": torch.empty(N, N // 8, dtype=torch.int16)}
    if bits > 2:
        dtype = torch.uint8 if bits == 3 else torch.int16
        held["residual"] = torch.empty(N, N // 8, dtype=dtype)
    return PackedWeight("quip-sharp-e8", 1, (N, N), held, {"bits": bits})


def tile(bits, dtype, target):
    from modulora_quip_sharp_e8.kernels import gpu

    (code,) = compiled(target, lambda: gpu.tile(weight(bits), (0, N), dtype))
    return code


def product(bits, rows, dtype, transpose, target):
    from modulora_quip_sharp_e8.kernels import gpu

    x = torch.empty(rows, N)
    (code,) = compiled(target, lambda: gpu.multiply(x, weight(bits), transpose, dtype))
    return code


@TARGETS
def test_tiles_are_written_16_bytes_at_a_time(target):
    code = tile(2, torch.bfloat16, target)
    assert code.registers <= 64, "half of the threads of a processor"
    assert set(code.stores) == {128}
    assert set(tile(3, torch.float16, target).stores) == {128}


@TARGETS
def test_a_product_of_one_row_reads_the_codes_of_32_weights_at_a_time(target):
    code = product(4, 1, torch.bfloat16, False, target)
    assert code.registers <= 128, "a quarter of the threads of a processor"
    if target != "gfx942":  # 64 lanes share its blocks, elsewhere 32
        assert code.loads[64] == 2, "codes and residual"
        assert code.loads[128] >= 1, "x"


@pytest.mark.parametrize("transpose", [False, True])
def test_products_of_more_rows_multiply_on_tensor_cores(transpose):
    code = product(2, 16, torch.bfloat16, transpose, "sm_86")
    assert "mma.sync" in code.text
    assert code.registers <= 128
    assert product(2, 1, torch.float32, True, "sm_86").registers <= 128
