"""The files that explain the method are few, and run without Hugging Face's libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PAPER = "spec packed tiles hookspecs registry options errors autograd packed_parameters layers lora"
MOST_LINES = 3500

IMPORT = """if True:
    import importlib, json, sys
    for name in sys.argv[1].split():
        importlib.import_module("modulora_core." + name)
    print(json.dumps({name: module.__file__ for name, module in sys.modules.items()
                      if isinstance(getattr(module, "__file__", None), str)}))
"""

TRAIN = """if True:
    import sys
    for name in ("transformers", "safetensors", "huggingface_hub"):
        sys.modules[name] = None  # importing it is an error
    import torch
    from torch import nn
    from modulora_core import LoRASettings, QuantLinear, add_lora
    from modulora_core.packed_parameters import PackedParameter
    from modulora_toy.quantizer import Toy

    torch.manual_seed(0)
    packed = Toy().pack(torch.randn(6, 4))
    layer = QuantLinear(PackedParameter(Toy(), packed), nn.Parameter(torch.randn(6)))
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(6, 2))
    assert add_lora(model, LoRASettings(rank=2, alpha=6.0, dropout=0.0)) == ["1"]
    A, B = model[1].lora_A["default"], model[1].lora_B["default"]
    assert {p for p in model.parameters() if p.requires_grad} == {A, B}
    nn.init.normal_(B)

    x = torch.randn(3, 4, requires_grad=True)
    y = model(x)
    got = torch.autograd.grad(y.square().sum(), (x, A, B))

    W = Toy().dequantize_tile(packed, (0, 6), torch.float32) + 3 * B @ A
    dense = model[2](nn.functional.linear(model[0](x), W, layer.bias))
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(got, torch.autograd.grad(dense.square().sum(), (x, A, B)))
"""


def run(code, *arguments, path=None):
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_method_is_read_in_few_lines_and_needs_torch_pluggy_and_pydantic():
    """If this fails: move what the method does not need out of these files, or import it later."""
    loaded = json.loads(run(IMPORT, PAPER))
    ours = {name: Path(file) for name, file in loaded.items() if name.startswith("modulora_core")}
    lines = {name: len(file.read_text("utf-8").splitlines()) for name, file in ours.items()}
    assert {f"modulora_core.{name}" for name in PAPER.split()} <= lines.keys()
    assert sum(lines.values()) <= MOST_LINES, lines
    libraries = {name.partition(".")[0] for name in loaded}
    assert {"torch", "pluggy", "pydantic"} <= libraries
    assert not libraries & {"transformers", "safetensors", "huggingface_hub", "numba"}


@pytest.mark.slow
def test_add_lora_trains_any_module_where_transformers_cannot_be_imported(toy_root):
    run(TRAIN, path=toy_root)
