"""A quantizer of three methods needs the core alone: no toolkit, no numba and no Triton."""

import os
import subprocess
import sys

from modulora_core.tests.conftest import TOY_SITE

WORK = """
import sys

import torch

for name in ("modulora_kernels", "numba", "triton"):
    sys.modules[name] = None  # importing it raises ImportError

from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.packed_parameters import PackedParameter
from modulora_core.registry import create

quantizer = create("toy")
W = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
packed = quantizer.pack(W)
x = torch.randn(5, 40)
dense = quantizer.dequantize_tile(packed, (0, 24), torch.float32)
assert torch.allclose(quantizer.matmul(x, packed), x @ dense.T, atol=1e-5)
assert quantizer.check_kernels(packed, torch.float32) == []

layer = LoRALinear(QuantLinear(PackedParameter(quantizer, packed)))
layer.add_adapter("default", 4, alpha=8)
wanted = x @ torch.randn(24, 40).T
adam = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
losses = []
for _ in range(20):
    adam.zero_grad()
    loss = (layer(x) - wanted).square().mean()
    loss.backward()
    adam.step()
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0] / 2, losses
"""


def test_a_quantizer_of_three_methods_packs_multiplies_and_trains_without_the_toolkit():
    process = subprocess.run(
        [sys.executable, "-c", WORK], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(TOY_SITE)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
