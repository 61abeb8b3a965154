"""The Triton kernels without a GPU: interpreted, and compiled for absent GPUs."""

from pathlib import Path

import pytest
import torch
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_gguf.quantizer import GGUF, Options

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ahead_of_time = pytest.importorskip("modulora_conformance.ahead_of_time")
gpu = pytest.importorskip("modulora_gguf.kernels.gpu")

SHAPE = (4096, 4096)


def test_interpreted_kernels_give_the_values_of_the_reference():
    run_interpreted(Path(__file__).with_name("check_gguf_interpreted.py"))


def compiled(kind, target, launch):
    packed = GGUF(Options(type=kind)).layout(SHAPE).empty("cpu")
    return ahead_of_time.compile_launch(lambda: launch(packed), target)


@pytest.mark.parametrize("kind", gpu.KINDS)
def test_tiles_are_written_16_bytes_at_a_time(kind):
    """The interpreter accepts more of Python than the compiler."""
    code = compiled(kind, "sm_90", lambda p: gpu.tile(p, (0, SHAPE[0]), torch.bfloat16))
    assert set(code.stores) == {128}


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_XS"])
def test_products_of_one_row_keep_everything_in_registers(kind):
    x = torch.empty(1, SHAPE[1], dtype=torch.bfloat16)
    compiled(kind, "sm_90", lambda p: gpu.product(x, p, False))


@pytest.mark.parametrize(("kind", "target"), [("Q4_K", "sm_80"), ("Q6_K", "gfx942")])
def test_products_of_several_rows_are_on_tensor_cores(kind, target):
    x = torch.empty(16, SHAPE[1], dtype=torch.bfloat16)
    code = compiled(kind, target, lambda p: gpu.product(x, p, False))
    assert any(unit in code.text for unit in ("mma.sync", "wgmma", "v_mfma"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_codes_of_a_block_of_256_are_read_16_bytes_at_a_time(target):
    """A thread decodes 16 neighbours or more, whose codes are in one load, and their scale once."""
    x = torch.empty(1, SHAPE[1], dtype=torch.bfloat16)
    product = compiled("Q4_K", target, lambda p: gpu.product(x, p, False))
    tile = compiled("Q4_K", target, lambda p: gpu.tile(p, (0, SHAPE[0]), torch.bfloat16))
    assert product.loads[128] >= 1
    assert product.loads[8] + tile.loads[8] <= 6, "three bytes of scales, and no code alone"
