"""The script of the large model's step on a tiny one: it writes, resumes, plans and measures, and what it checks can fail."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.errors import CheckpointError

pytest.importorskip(
    "modulora_quip_sharp_e8", reason="what is written: pip install ./plugins/quip-sharp-e8"
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("llama65b", "llama_step", "random_checkpoint")
QUIP = "quip-sharp-e8"


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], ModuleType]]:
    """A benchmark's module by name: they import each other from their own folder, as scripts do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        sys.modules.pop(name, None)
    torch.set_num_threads(before)


def test_the_script_runs_and_its_numbers_fit_together(
    module: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    flags = ["--model", "tiny", "--seq-len", "16", "--folder", str(tmp_path), "--json", str(file), "--mapped", "--quiet"]  # fmt: skip
    assert module("llama65b").main(flags) == 0
    measured: dict[str, Any] = json.loads(file.read_text())
    step, items = measured["step"], measured["plan"]["items"]
    assert step["gradients"] == 2 * 7 * 2, "A and B of seven layers in two blocks"
    assert step["bad_gradients"] == []
    # the logits of random weights: the loss scatters around that of logits of variance 1 by their spread over 15 tokens
    assert abs(step["loss"] - step["expected_loss"]) < 4 * 15**-0.5
    assert step["trained"] * 4 == items["adapter"] == items["optimizer"] / 2
    on_disk = open_checkpoint(tmp_path / f"tiny-{QUIP}")
    assert measured["checkpoint_bytes"] == on_disk.nbytes
    assert measured["plan"]["packed_bytes"] == on_disk.record.nbytes
    assert items["packed_codes"] + items["packed_scales"] == on_disk.record.nbytes / 2, (
        "one of two blocks at a time"
    )
    printed = capsys.readouterr().out
    assert "finite and not zero: all" in printed


@pytest.mark.parametrize("quantizer", [QUIP, "nf4", "optq:bits=3"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    module: Callable[[str], ModuleType], tmp_path: Path, quantizer: str
) -> None:
    pytest.importorskip(f"modulora_{quantizer.partition(':')[0].replace('-', '_')}")
    random_checkpoint = module("random_checkpoint")

    def write(out: str, progress: Callable[[int, int], None] | None = None) -> bytes:
        created = random_checkpoint.create_quantizer(quantizer)
        random_checkpoint.write_checkpoint("tiny", created, tmp_path / out, progress=progress)
        return (tmp_path / out / "model.safetensors").read_bytes()

    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done > total // 2:
            raise KilledError

    with pytest.raises(KilledError):
        write("killed", kill)
    assert not (tmp_path / "killed").exists(), "half of it never looks whole"
    told: list[int] = []
    assert write("killed", lambda done, _: told.append(done)) == write("whole")
    with torch.no_grad():
        logits = load_model(tmp_path / "whole", mapped=True)(torch.arange(16)[None]).logits
    assert 0.5 < float(logits.std()) < 2, "the products keep the size of their inputs"


def test_another_request_s_checkpoint_is_refused(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    random_checkpoint = module("random_checkpoint")
    created = random_checkpoint.create_quantizer(QUIP)
    first = random_checkpoint.write_checkpoint("tiny", created, tmp_path / "a")
    assert random_checkpoint.write_checkpoint("tiny", created, tmp_path / "a") == first
    with pytest.raises(CheckpointError, match="expected a checkpoint whose seed is 1, got 0"):
        random_checkpoint.write_checkpoint("tiny", created, tmp_path / "a", seed=1)


def test_gradients_that_are_zero_or_not_finite_are_told(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    from modulora_core.adapters.lora import LoRASettings, adapter_layers, add_lora

    random_checkpoint = module("random_checkpoint")
    random_checkpoint.write_checkpoint(
        "tiny", random_checkpoint.create_quantizer(QUIP), tmp_path / "a"
    )
    model = load_model(tmp_path / "a")
    add_lora(model, LoRASettings(rank=2, dropout=0.0))  # B is zero, and so are the gradients of A
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    first = next(layer for _, layer in adapter_layers(model))
    first.lora_B["default"].grad[0, 0] = float("nan")
    told = module("llama_step")._gradients(model)
    assert len(told["bad_gradients"]) == 7 * 2 + 1
    assert sum(name.endswith("lora_A") for name in told["bad_gradients"]) == 14
