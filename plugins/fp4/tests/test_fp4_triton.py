"""The Triton kernels without a GPU: interpreted, and compiled for absent GPUs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_fp4.quantizer import FP4, Options

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")
gpu = pytest.importorskip("modulora_fp4.kernels.gpu")

SHAPE = (4096, 4096)
TARGETS = pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
KINDS = pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])


def test_interpreted_kernels_give_the_values_of_the_reference():
    run_interpreted(Path(__file__).with_name("check_fp4_interpreted.py"))


def empty(kind):
    """A weight of ordinary size, whose values nothing reads."""
    return FP4(Options(type=kind)).layout(SHAPE).empty("cpu")


@TARGETS
@KINDS
def test_tiles_are_read_8_and_written_16_bytes_at_a_time(kind, target):
    with ahead_of_time.recorded() as calls:
        gpu.tile(empty(kind), (0, SHAPE[0]), torch.bfloat16)
    (call,) = calls
    call = replace(call, constants={**call.constants, "CHUNK": 4096})
    code = ahead_of_time.compile_call(call, target)
    assert code.spills == 0
    assert set(code.stores) == {128}
    # of 4096 weights, which are 2048 bytes, each of 128 threads has 16 bytes
    assert code.loads[64] == 2, "the codes"
    assert code.loads[8] <= 2, "no scale for each weight"
