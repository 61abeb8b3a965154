"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

from pathlib import Path

import pytest
import torch
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_qtip import trellis

from modulora_core.packed import PackedWeight

pytest.importorskip("triton")
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")
predicted = pytest.importorskip("modulora_conformance.predicted")

pytestmark = pytest.mark.slow

N = 4096


def test_interpreted_kernels_give_the_values_of_the_definition():
    run_interpreted(Path(__file__).with_name("check_qtip_interpreted.py"))


def weight(bits, states, code):
    """Walks of an ordinary size, whose values nothing reads."""
    walks = torch.empty(N // 16, N // 16, trellis.units(bits), dtype=torch.int16)
    facts = {"bits": bits, "states": states, "code": code, "hadamard": "full"}
    return PackedWeight("qtip", 1, (N, N), {"trellis": walks}, facts)


@pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
@pytest.mark.parametrize(
    "facts", [(2, 12, "bytes"), (2.5, 16, "mul1"), (3, 16, "mcg"), (4, 16, "mul1")]
)
def test_kernels_compile_without_spills(target, facts):
    from modulora_qtip.kernels import gpu

    C = weight(*facts)

    def launches():
        gpu.tile(C, (0, N), torch.bfloat16)
        for rows in (1, 16):
            for transpose in (False, True):
                gpu.multiply(torch.empty(rows, N), C, transpose, torch.bfloat16)

    found = ahead_of_time.compile_launches(launches, target)
    assert len(found) == 5
    assert all(code.spills == 0 for code in found)


@pytest.mark.parametrize(("rows", "most"), [(1, 8), (64, 12)])
def test_a_weight_of_the_default_takes_few_instructions(rows, most):
    from modulora_kernels.triton.launching import recorded
    from modulora_qtip.kernels import gpu

    with recorded() as calls:
        gpu.multiply(torch.empty(rows, N), weight(2, 12, "bytes"), False, torch.bfloat16)
    counts = []
    for choice in (choice for call in calls for choice in call.choices()):
        thread = predicted.per_thread(choice, ahead_of_time.compile_call(choice, "sm_90"))
        threads = choice.programs * predicted.threads(choice)
        counts.append(thread["all"] * threads / predicted.weights_of(choice))
    assert min(counts) <= most
