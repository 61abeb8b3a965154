"""Quantizing with calibration: what is recorded, what is refused, and what a killed run leaves."""

from __future__ import annotations

import importlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.checkpoints.outputs import partial_name
from modulora_core.cli import main
from modulora_core.errors import CheckpointError, DataError, OptionError, RequestError
from modulora_core.models.unfinished import MARKER
from modulora_core.quantization.quantize import Override, QuantizeResult, quantize
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.conftest import install_package

pytestmark = pytest.mark.usefixtures("one_thread")

INIT = """
from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

def spec(name, wants):
    return QuantizerSpec(name=name, summary="Rounds, and keeps the diagonal of H", location="modulora_seen.quantizer:" + name.title(),
                         protocol=1, bits=(8,), calibration=wants)

SEEN, GLANCED = spec("seen", "required"), spec("glanced", "optional")

@hookimpl
def modulora_quantizers():
    return [SEEN, GLANCED]
"""

QUANTIZER = """
import torch
from modulora_core.spec import PackedWeight, Quantizer
from modulora_seen import GLANCED, SEEN

class Seen(Quantizer):
    spec = SEEN

    def pack(self, weight, calibration=None):
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 3 + 1e-6
        diagonal = torch.zeros(weight.shape[1]) if calibration is None else calibration.hessian.diagonal().clone()
        tensors = {"codes": (weight / scale).round().to(torch.int8), "scale": scale, "diagonal": diagonal}
        return PackedWeight(self.spec.name, 1, tuple(weight.shape), tensors)

    def dequantize_tile(self, packed, rows, dtype):
        start, stop = rows
        return (packed.tensors["codes"][start:stop].float() * packed.tensors["scale"][start:stop]).to(dtype)

class Glanced(Seen):
    spec = GLANCED
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with quantizers that want calibration."""
    root = tmp_path_factory.mktemp("seen-site")
    install_package(
        root,
        "modulora-seen",
        "seen",
        "modulora_seen",
        {"__init__.py": INIT, "quantizer.py": QUANTIZER},
    )
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    yield root
    sys.path.remove(str(root))


@pytest.fixture(scope="module")
def source(site: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source") / "llama"
    save_llama_with_tokenizer(folder)
    return str(folder)


CONFIG = CalibrationConfig("pydoc[:10%]", samples=6, seq_len=32, batch_size=2)


def run(source: str, out: Path, quantizer: str = "seen", **arguments: Any) -> QuantizeResult:
    return quantize(source, out, quantizer, **{"calibration": CONFIG, "seed": 1, **arguments})


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def diagonals(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".diagonal")}


def test_the_samples_are_recorded_and_the_model_loads(source: str, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out")
    record = open_checkpoint(tmp_path / "out").record
    assert record.calibration == result.calibration
    assert record.calibration is not None
    assert {key: record.calibration[key] for key in ("source", "samples", "seq_len", "sequential", "batch_size")} == {
        "source": "pydoc[:10%]", "samples": 6, "seq_len": 32, "sequential": True, "batch_size": 2}  # fmt: skip
    assert all(bool((diagonal > 0).any()) for diagonal in diagonals(tmp_path / "out").values())
    load_model(tmp_path / "out", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_optional_calibration_may_be_left_out(source: str, tmp_path: Path) -> None:
    run(source, tmp_path / "with", "glanced")
    run(source, tmp_path / "without", "glanced", calibration=None)
    assert all(bool((diagonal > 0).any()) for diagonal in diagonals(tmp_path / "with").values())
    assert not any(bool(diagonal.any()) for diagonal in diagonals(tmp_path / "without").values())
    assert open_checkpoint(tmp_path / "without").record.calibration is None


def test_an_override_without_calibration_stands_among_layers_with_it(
    source: str, toy: object, tmp_path: Path
) -> None:
    run(source, tmp_path / "out", overrides=[Override("*.mlp.*", "toy")])
    names = diagonals(tmp_path / "out")
    assert names
    assert all(".self_attn." in name for name in names)


def test_without_enough_text_for_the_default_all_of_it_is_used(source: str, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    result = run(source, tmp_path / "out", calibration=CalibrationConfig(str(text), seq_len=32))
    assert result.calibration is not None
    assert 0 < result.calibration["samples"] < 128


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"calibration": None}, OptionError, "seen: expected a calibration text"),
        ({"quantizer": "toy"}, OptionError, "toy uses none"),
        (
            {"calibration": CalibrationConfig("pydoc[:10%]", samples=10**6, seq_len=32)},
            DataError,
            "1000000 samples",
        ),
        ({"calibration": CalibrationConfig("pydoc", seq_len=4096)}, OptionError, "at most 128"),
        ({"calibration": CalibrationConfig("nowhere.txt", seq_len=32)}, DataError, "nowhere.txt"),
        ({"include": ["lm_head"]}, OptionError, "lm_head is outside of the decoder blocks"),
    ],
)
def test_a_wrong_request_is_refused_and_writes_nothing(
    source: str,
    toy: object,
    tmp_path: Path,
    arguments: dict[str, Any],
    error: type[RequestError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(source, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["samples", "seq_len", "batch_size"])
def test_a_number_below_one_is_refused(option: str) -> None:
    with pytest.raises(OptionError, match=f"calibration {option}"):
        CalibrationConfig("pydoc", **{option: 0})


KILLED = """
import sys
sys.path.insert(0, {site!r})
import torch
torch.set_num_threads(1)
from modulora_core.calibration import CalibrationConfig
from modulora_core.quantization.quantize import quantize
print("begun", flush=True)
quantize({source!r}, {out!r}, "seen", seed=1, resume=True,
         calibration=CalibrationConfig("pydoc[:10%]", samples=6, seq_len=32, batch_size=2))
"""


def killed(site: Path, source: str, out: Path, after: int, wait: float) -> int:
    """Run, and kill it ``wait`` seconds after that many parameters are written. Returns the exit status."""
    script = KILLED.format(site=str(site), source=source, out=str(out))
    journal = partial_name(out) / "written.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        while process.poll() is None:
            if journal.is_file() and len(journal.read_text().splitlines()) >= after:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                return process.wait()
            time.sleep(0.001)
        return process.returncode


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    site: Path, source: str, tmp_path: Path
) -> None:
    run(source, tmp_path / "whole")
    out, moments, cut = tmp_path / "out", random.Random(0), 0
    for after in sorted(moments.sample(range(16), 4)):  # 21 parameters are written
        assert killed(site, source, out, after, wait=moments.uniform(0, 0.02)) == -signal.SIGKILL
        if out.exists():  # the kill came after all was done
            break
        cut += 1
    else:
        assert killed(site, source, out, 1000, wait=0) == 0
    assert cut > 0
    assert {name: data for name, data in stored(out).items() if name != MARKER} == stored(
        tmp_path / "whole"
    )


STOPPED = """
import os, signal, sys
sys.path.insert(0, {site!r})
from modulora_core.checkpoints import shards
from modulora_core.calibration import CalibrationConfig
from modulora_core.quantization.quantize import quantize
write, count = shards.ShardWriter.write, 0
def write_and_die(self, *arguments):
    global count
    count += 1
    if count > {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
shards.ShardWriter.write = write_and_die
quantize({source!r}, {out!r}, "seen", seed=1, calibration=CalibrationConfig("pydoc[:10%]", samples=6, seq_len=32, batch_size=2))
"""


def stop(site: Path, source: str, out: Path, after: int) -> None:
    """A run that is killed when it is about to write its ``after``-th parameter."""
    script = STOPPED.format(site=str(site), source=source, out=str(out), after=after)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL


def test_a_resumed_run_packs_only_what_is_missing(
    site: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "whole")
    stop(site, source, tmp_path / "out", after=14)
    journal = partial_name(tmp_path / "out") / "written.jsonl"
    done = {json.loads(line) for line in journal.read_text().splitlines()}
    quantizer = importlib.import_module("modulora_seen.quantizer").Seen
    packed, pack = [], quantizer.pack
    monkeypatch.setattr(quantizer, "pack", lambda *given: packed.append(1) or pack(*given))
    run(source, tmp_path / "out", resume=True)
    weights = open_checkpoint(tmp_path / "out").record.weights
    layouts = len(
        open_checkpoint(tmp_path / "out").record.sites
    )  # Quantizer.layout() packs a weight of each shape
    assert len(done & set(weights)) > 3
    assert len(packed) - layouts == len(set(weights) - done)
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")


@pytest.fixture(scope="module")
def stopped(site: Path, source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run was killed; those that would go on with something else leave it as it is."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    stop(site, source, out, after=5)
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        (
            {"calibration": CalibrationConfig("pydoc[:20%]", samples=6, seq_len=32, batch_size=2)},
            "calibration",
        ),
        (
            {"calibration": CalibrationConfig("pydoc[:10%]", samples=5, seq_len=32, batch_size=2)},
            "calibration",
        ),
        ({"exclude": ["*.down_proj"]}, "weights"),
        ({"quantizer": "glanced"}, "recipes"),
    ],
)
def test_a_changed_request_is_not_resumed(
    source: str, stopped: Path, change: dict[str, Any], named: str
) -> None:
    before = stored(partial_name(stopped))
    assert before
    with pytest.raises(CheckpointError, match=f"differs in .*{named}.*without --resume"):
        run(source, stopped, resume=True, **change)
    assert stored(partial_name(stopped)) == before


def test_a_changed_text_of_the_same_name_is_not_resumed(
    site: Path, source: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    config = CalibrationConfig(str(text), samples=6, seq_len=32)
    words = "The quick brown fox jumps over the lazy dog. " * 200
    text.write_text(words)
    (tmp_path / "out.partial").mkdir()
    run(source, tmp_path / "done", calibration=config)
    record = open_checkpoint(tmp_path / "done").record.to_json()
    (tmp_path / "out.partial" / ".modulora-partial").touch()
    (tmp_path / "out.partial" / "request.json").write_text(
        json.dumps({"record": record, "contents": ""})
    )
    text.write_text(words.replace("lazy", "sleepy"))
    with pytest.raises(CheckpointError, match=r"differs in calibration"):
        run(source, tmp_path / "out", calibration=config, resume=True)


def test_another_finetune_of_the_same_model_is_not_resumed(
    site: Path, source: str, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    stop(site, str(copy), tmp_path / "out", after=5)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="differs in the values of the model's weights"):
        run(str(copy), tmp_path / "out", resume=True)


def test_the_command_line_calibrates(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", source, str(tmp_path / "out"), "-q", "seen", "--calibration", "pydoc[:10%]", "--samples", "6",
             "--seq-len", "32", "--batch-size", "2", "--seed", "1", "--spill", "--json"]  # fmt: skip
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["calibration"]["samples"] == 6
    assert printed["unreached"] == []
    run(source, tmp_path / "again")
    assert stored(tmp_path / "out") == stored(tmp_path / "again")


def test_calibration_options_without_a_text_are_refused(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", source, str(tmp_path / "out"), "-q", "seen", "--seq-len", "32"]) == 2
    assert "--seq-len: expected --calibration SOURCE beside it" in capsys.readouterr().err
