"""The Triton kernels without a GPU: interpreted, and compiled for absent GPUs."""

from pathlib import Path

import pytest
import torch
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_int8.quantizer import INT8, Options

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")
gpu = pytest.importorskip("modulora_int8.kernels.gpu")

TARGETS = pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
SHAPE = (4096, 4096)


def test_interpreted_kernels_give_the_values_of_the_reference():
    run_interpreted(Path(__file__).with_name("check_int8_interpreted.py"))


def empty(group_size=None):
    """A weight of ordinary size, whose values nothing reads."""
    return INT8(Options(group_size=group_size)).layout(SHAPE).empty("cpu")


@TARGETS
@pytest.mark.parametrize("group_size", [None, 64], ids=str)
def test_tiles_are_read_and_written_16_bytes_at_a_time(group_size, target):
    code = ahead_of_time.compile_launch(
        lambda: gpu.tile(empty(group_size), (0, SHAPE[0]), torch.bfloat16), target
    )
    assert code.registers <= 64, "eight programs on a processor, half of its threads"
    assert set(code.stores) == {128}
    # of 2048 weights each of 128 threads has 16 bytes; AMD's 256 have 8
    assert code.loads[64 if target == "gfx942" else 128] == 1, "the codes"
    assert sum(code.loads.values()) <= 2, "the codes and one scale"


@TARGETS
def test_a_product_of_one_row_reads_16_bytes_at_a_time(target):
    x = torch.empty(1, SHAPE[1], dtype=torch.bfloat16)
    code = ahead_of_time.compile_launch(lambda: gpu.product(x, empty(), False), target)
    assert code.registers <= 128, "four programs on a processor, a quarter of its threads"
    assert code.loads[128] >= 1
    assert code.loads[8] == code.loads[16] == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("rows", "dtype", "transpose"),
    [(1, torch.float32, True), (16, torch.bfloat16, False), (32, torch.float16, True)],
    ids=["1-transposed", "16", "32-transposed"],
)
def test_other_products_keep_everything_in_registers(rows, dtype, transpose, target):
    x = torch.empty(rows, SHAPE[0 if transpose else 1], dtype=dtype)
    code = ahead_of_time.compile_launch(lambda: gpu.product(x, empty(), transpose), target)
    assert code.registers <= 144, (
        "three programs on a processor, where x's 32 rows and their sums are held too"
    )
    assert code.loads[128] >= 1
    if rows > 1:
        units = ("mma.sync", "wgmma", "v_mfma")
        assert any(unit in code.text for unit in units), (
            "a product of 16 bits that isn't on tensor cores"
        )


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_groups_that_are_no_power_of_two_compile_too(target):
    """The interpreter accepts more of Python than the compiler."""
    packed = empty(group_size=24)
    ahead_of_time.compile_launch(
        lambda: gpu.product(torch.empty(1, SHAPE[1]), packed, False), target
    )
    ahead_of_time.compile_launch(lambda: gpu.tile(packed, (1, 20), torch.float32), target)
