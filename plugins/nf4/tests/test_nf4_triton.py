"""The Triton kernels without a GPU: interpreted, and compiled for absent GPUs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_nf4.quantizer import NF4, Options

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")
gpu = pytest.importorskip("modulora_nf4.kernels.gpu")

TARGETS = pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
SHAPE = (4096, 4096)


def test_interpreted_kernels_give_the_values_of_the_reference():
    run_interpreted(Path(__file__).with_name("check_nf4_interpreted.py"))


def empty(double_quant=False, shape=SHAPE):
    """A weight of ordinary size, whose values nothing reads."""
    return NF4(Options(double_quant=double_quant)).layout(shape).empty("cpu")


@TARGETS
@pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
def test_tiles_are_read_and_written_16_bytes_at_a_time(double_quant, target):
    with ahead_of_time.recorded() as calls:
        gpu.tile(empty(double_quant), (0, SHAPE[0]), torch.bfloat16)
    (call,) = calls
    # of 4096 weights, which are 2048 bytes, each of 128 threads has 16 bytes
    call = replace(call, constants={**call.constants, "CHUNK": 4096})
    code = ahead_of_time.compile_call(call, target)
    assert code.spills == 0
    assert code.registers <= 64, "eight programs on a processor, half of its threads"
    assert set(code.stores) == {128}
    assert code.loads[128] == 1, "the codes"
    assert code.loads[32] <= 32 + 3, (
        "each level, and the scale or what makes it: no code and no scale for each weight"
    )
    assert code.loads[8] == double_quant


@TARGETS
def test_a_product_of_one_row_reads_16_bytes_at_a_time(target):
    x = torch.empty(1, SHAPE[1], dtype=torch.bfloat16)
    code = ahead_of_time.compile_launch(lambda: gpu.product(x, empty(), False), target)
    assert code.registers <= 128, "four programs on a processor, a quarter of its threads"
    assert code.loads[128] >= 1
    assert code.loads[8] == code.loads[16] == 0
