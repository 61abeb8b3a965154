"""The Triton kernels of :mod:`modulora_core.blockwise` on a machine without a GPU: interpreted, and compiled for GPUs that aren't here."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

BESIDE_PLAIN_TORCH = """
import math
import torch
from modulora_core import kernels
from modulora_core.blockwise import BLOCK, Blockwise
from modulora_core.kernels import triton_blockwise

used = []
for name in ("quantize", "dequantize"):
    kernel = getattr(triton_blockwise, name)
    setattr(triton_blockwise, name, lambda *a, kernel=kernel, name=name: (used.append(name), kernel(*a)))

def both(x):
    by_kernel = Blockwise.quantize(x)
    back = by_kernel.dequantize()
    load = kernels.load_triton, kernels.load
    kernels.load_triton = kernels.load = lambda *_: None
    expected = Blockwise.quantize(x)
    truth = expected.dequantize()
    kernels.load_triton, kernels.load = load
    assert torch.equal(by_kernel.codes, expected.codes), x.shape
    for found, right in ((by_kernel.scales, expected.scales), (back, truth)):
        assert found.dtype == right.dtype
        assert torch.equal(found.nan_to_num(7, 8, 9), right.nan_to_num(7, 8, 9)), x.shape
    return back

generator = torch.Generator().manual_seed(0)
for shape in ((3, 5, 2 * BLOCK), (7, BLOCK - 1), (33, BLOCK + 1), (1, 1), (0, 40), (BLOCK,), (17, 576)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        both((torch.randn(shape, generator=generator) * 10).to(dtype))
assert used.count("quantize") == used.count("dequantize") == 21

halves = torch.arange(-127, 127).view(2, 127) / 2  # in blocks whose steps are 1: every half goes to the even code
halves = torch.cat([torch.full((2, 1), 127.0), halves], dim=1)
assert torch.equal(both(halves), halves.round())
tiny = torch.tensor([[1e-45, -1e-40, 0.0], [2.0**-119, -(2.0**-120), 0.0], [3e38, 1e38, -3e38]])
both(tiny)
for odd in (math.nan, math.inf, -math.inf):
    x = torch.randn(2, BLOCK + 3, generator=generator)
    x[0, 5] = odd
    back = both(x)
    assert back[0, :BLOCK].isnan().all() and back[0, BLOCK:].isfinite().all() and back[1].isfinite().all()
"""


def test_interpreted_kernels_give_the_bits_of_plain_torch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_PLAIN_TORCH],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_kernels_move_whole_blocks_in_wide_pieces(target: str, dtype: torch.dtype) -> None:
    ahead_of_time: Any = pytest.importorskip("modulora_conformance.ahead_of_time")
    from modulora_core.kernels import triton_blockwise as gpu

    x, codes = torch.empty(512, 2048, dtype=dtype), torch.empty(512, 2048, dtype=torch.int8)
    scales = torch.empty(512, 16)
    for call in (
        lambda: gpu.quantize(x, 128, 2.0**-119, codes, scales),
        lambda: gpu.dequantize(codes, scales, 128, x),
    ):
        (code,) = ahead_of_time.compile_launches(call, target)
        assert code.spills == 0
        assert code.registers <= 64, "half of the threads of a processor"
        # 16 activations each of 128 threads, and AMD's 256 have 8: their codes are 16 bytes, or 8
        wide = {128, 32, 64 if target == "gfx942" else 128}
        assert set(code.loads) | set(code.stores) == wide, "the activations, the scales, and the codes"
