"""GPTQModel on the CPU reads our EXL3 folders, and we read the folders that it writes.

GPTQModel is no dependency: `pip install gptqmodel` to run these tests. It patches other libraries
when it is imported, so it runs in another process. It quantizes to EXL3 on GPUs only, so it writes
what it has read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exl3_folders import mixed, save_exl3
from modulora_convert.convert import convert
from modulora_qtip.quantizer import QTIP

from modulora_core.checkpoints.opening import open_packed
from modulora_core.hf.load_model import load_model
from modulora_core.tests.other_tools import logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None, reason="the peer, gptqmodel, isn't installed"
    ),
]

READ_AND_WRITE = """
import sys, torch
from gptqmodel import GPTQModel, BACKEND
options = {"backend": BACKEND.EXL3_TORCH, "device": "cpu", "dtype": torch.float32}
model = GPTQModel.load(sys.argv[1], **options)
layers = {n: m for n, m in model.model.named_modules() if hasattr(m, "get_weight_tensor")}
weights = {n: m.get_weight_tensor(torch.float32).T.contiguous() for n, m in layers.items()}
with torch.no_grad():
    logits = model.model(torch.arange(3, 27).view(2, 12)).logits
torch.save({"weights": weights, "logits": logits}, sys.argv[2])
model.save(sys.argv[3])
"""


@pytest.mark.parametrize("converted", [False, True], ids=["as-published", "written-by-us"])
def test_gptqmodel_reads_and_writes_the_same_model(converted: bool, tmp_path: Path) -> None:
    save_exl3(tmp_path / "m", choice=lambda name, n: mixed(name, n) | {"signs": False})
    folder = tmp_path / "m"
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]["version"]  # ExLlamaV3's, which GPTQModel refuses
    (folder / "config.json").write_text(json.dumps(values))
    if converted:
        convert(str(folder), tmp_path / "ours", "modulora")
        convert(str(tmp_path / "ours"), folder := tmp_path / "theirs", "exl3")
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_WRITE, str(folder), "read.pt", "saved"],
        cwd=tmp_path,
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"},  # without it, it crashes on two cores
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "read.pt")
    checkpoint = open_packed(folder)
    assert {f"{name}.weight" for name in theirs["weights"]} == set(checkpoint.record.weights)
    for name, _ in checkpoint.record.items():
        (packed,) = checkpoint.packed(name)
        W = QTIP().dequantize_tile(packed, (0, packed.shape[0]), torch.float32)
        peer = theirs["weights"][name.removesuffix(".weight")]
        # the peer doesn't round values to fp16 before it rotates them
        assert float((W - peer).abs().max()) < 2**-11 * float(W.abs().max()), name
    ours = logits(load_model(folder, dtype="float32"))
    assert float((ours - theirs["logits"]).abs().max()) < 2e-3 * float(ours.abs().max())
    saved = logits(load_model(tmp_path / "saved", dtype="float32"))
    assert torch.equal(saved, ours)
