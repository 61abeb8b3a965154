"""The Triton kernels on a machine without a GPU: interpreted, and compiled for absent GPUs."""

from pathlib import Path

import pytest
import torch
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_optq import packing
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ

pytest.importorskip("triton")
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")
gpu = pytest.importorskip("modulora_optq.kernels.gpu")

pytestmark = pytest.mark.slow

TARGETS = pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
SHAPE = (4096, 4096)


def test_interpreted_kernels_give_the_values_of_the_reference():
    run_interpreted(Path(__file__).with_name("check_optq_interpreted.py"))


def empty(bits, symmetric=False):
    """A weight of ordinary size, whose values nothing reads."""
    options = Options(bits=bits, symmetric=symmetric, group_size=64)
    return OPTQ(options).layout(SHAPE).empty("cpu")


@TARGETS
@pytest.mark.parametrize("bits", [3, 4])
def test_tiles_are_read_and_written_16_bytes_at_a_time(bits, target):
    code = ahead_of_time.compile_launch(
        lambda: gpu.tile(empty(bits), (0, SHAPE[0]), torch.bfloat16), target
    )
    wide = code.loads[128]
    assert code.registers <= 64, "eight programs on a processor, half of its threads"
    assert set(code.stores) == {128}
    assert wide >= len(packing.PLANES[bits])
    assert code.loads[8] <= wide, "a byte of zeros for 16 of codes, in each plane"
    assert code.loads[16] <= wide, "a scale for as many"


@TARGETS
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_product_of_one_row_reads_16_bytes_at_a_time(bits, target):
    x = torch.empty(1, SHAPE[1], dtype=torch.bfloat16)
    code = ahead_of_time.compile_launch(lambda: gpu.product(x, empty(bits), False), target)
    assert code.registers <= 128, "four programs on a processor, a quarter of its threads"
    assert code.loads[128] >= len(packing.PLANES[bits])
