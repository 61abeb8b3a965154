"""A step of a tiny Llama with random packed weights, and its checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from modulora_core.checkpoints.opening import open_packed
from modulora_core.hf.load_model import load_model
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.registry import Choice

pytest.importorskip("modulora_nf4", reason="pip install ./plugins/nf4")

Module = Callable[[str], ModuleType]


def test_the_script_measures_a_step_and_plans_it(
    module: Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    flags = ["--model", "tiny", "-q", "nf4", "--seq-len", "16", "--mapped", "--one-process"]
    flags += ["--folder", str(tmp_path), "--json", str(file)]
    assert module("llama65b").main(flags) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    backward, items = found["phases"]["backward"], found["plan"]["items"]
    assert backward["gradients"] == 2 * 7 * 2, "A and B of seven layers in two blocks"
    assert backward["bad_gradients"] == []
    # logits of variance 1 have a loss of log(512) + 0.5, within its spread over 15 tokens
    assert abs(found["phases"]["forward"]["loss"] - 6.74) < 4 * 15**-0.5
    assert backward["trained"] * 4 == items["adapter"]
    checkpoint = open_packed(tmp_path / "tiny-nf4")
    assert found["checkpoint_bytes"] == checkpoint.nbytes
    assert found["plan"]["packed_bytes"] == checkpoint.record.nbytes
    assert "Wrong gradients: none" in capsys.readouterr().out


@pytest.mark.parametrize("quantizer", ["nf4", "optq:bits=3", "quip-sharp-e8"])
def test_random_packed_weights_keep_the_size_of_their_inputs(
    module: Module, tmp_path: Path, quantizer: str
) -> None:
    pytest.importorskip(f"modulora_{quantizer.partition(':')[0].replace('-', '_')}")
    module("llama").write_checkpoint("tiny", Choice.parse(quantizer).create(), tmp_path / "a")
    with torch.no_grad():
        logits = load_model(tmp_path / "a", device="cpu", dtype="float32")(torch.arange(16)[None])
    assert 0.5 < float(logits.logits.std()) < 2


def test_zero_and_infinite_gradients_are_wrong(module: Module, tmp_path: Path) -> None:
    module("llama").write_checkpoint("tiny", Choice.parse("nf4").create(), tmp_path / "a")
    model = load_model(tmp_path / "a", device="cpu", dtype="float32")
    add_lora(model, LoRASettings(rank=2, dropout=0.0))  # B is zero, and so is A's gradient
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    first = next(layer for _, layer in adapter_layers(model))
    first.lora_B["default"].grad[0, 0] = float("inf")
    wrong = module("llama65b").bad_gradients(model)
    assert len(wrong) == 7 * 2 + 1
    assert sum("lora_A" in name for name in wrong) == 14
