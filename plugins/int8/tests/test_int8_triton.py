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
    # of 2048 weights each of 128 threads has 16 bytes
    assert code.loads[128] == 1, "the codes"
    assert sum(code.loads.values()) <= 2, "the codes and one scale"


@TARGETS
def test_a_product_of_one_row_reads_16_bytes_at_a_time(target):
    x = torch.empty(1, SHAPE[1], dtype=torch.bfloat16)
    code = ahead_of_time.compile_launch(lambda: gpu.product(x, empty(), False), target)
    assert code.registers <= 128, "four programs on a processor, a quarter of its threads"
    assert code.loads[128] >= 1
    assert code.loads[8] == code.loads[16] == 0
