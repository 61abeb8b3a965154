"""Quantizing with tuning: what is recorded, what is refused, and what a killed run leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

from modulora_core.calibration import CalibrationConfig, TuningConfig
from modulora_core.checkpoints.checkpoint import open_checkpoint
from modulora_core.checkpoints.outputs import partial_name
from modulora_core.checkpoints.shards import ShardWriter
from modulora_core.cli import main
from modulora_core.errors import CheckpointError, DataError, OptionError, RequestError
from modulora_core.quantization.quantize import Override, QuantizeResult, quantize
from modulora_core.tests.scaled_quantizer import installed, save_model_with_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TUNING = TuningConfig(epochs=2, learning_rate=2e-2)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("scaled-site")
    with installed(root):
        yield root


@pytest.fixture(scope="module")
def scaled(site: Path) -> ModuleType:
    return sys.modules["modulora_scaled.quantizer"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        save_model_with_tokenizer(
            "llama-biased", tmp_path_factory.mktemp("source") / "llama", "bfloat16"
        )
    )


def config(tuning: TuningConfig | None = TUNING, **changed: Any) -> CalibrationConfig:
    return CalibrationConfig(
        "pydoc[:10%]", tuning=tuning, **{"samples": 6, "seq_len": 32, "batch_size": 2, **changed}
    )


def run(source: str, out: Path, quantizer: str = "scaled", **arguments: Any) -> QuantizeResult:
    return quantize(source, out, quantizer, **{"calibration": config(), "seed": 1, **arguments})


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def packs(scaled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calibrations that ``pack`` will be given."""
    given, pack = list[Any](), scaled.Scaled.pack

    def noted(self: Any, weight: Any, calibration: Any = None) -> Any:
        given.append(calibration)
        return pack(self, weight, calibration)

    monkeypatch.setattr(scaled.Scaled, "pack", noted)
    return given


@pytest.fixture(scope="module")
def whole(
    site: Path, source: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizeResult]:
    """A tuned checkpoint, and what was told of it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(source, out)


def test_tuning_is_recorded_and_told(
    whole: tuple[Path, QuantizeResult], capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = whole
    record = open_checkpoint(out).record
    assert record.calibration is not None
    assert record.calibration["tuning"] == {
        "epochs": 2,
        "learning_rate": 0.02,
        "batch_size": 16,
    }  # of 32 tokens
    assert result.calibration == record.calibration
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == record.calibration


def test_spilled_or_not_and_run_again_the_bytes_are_the_same(
    whole: tuple[Path, QuantizeResult], source: str, tmp_path: Path
) -> None:
    run(source, tmp_path / "spilled", calibration=config(spill=True))
    assert stored(tmp_path / "spilled") == stored(whole[0])


def test_no_epochs_are_no_tuning(site: Path, source: str, tmp_path: Path) -> None:
    told = run(source, tmp_path / "none", calibration=config(TuningConfig(epochs=0)))
    run(source, tmp_path / "untuned", calibration=config(None))
    assert stored(tmp_path / "none") == stored(tmp_path / "untuned")
    assert told.tuning_errors is None
    record = open_checkpoint(tmp_path / "none").record
    assert record.calibration is not None
    assert "tuning" not in record.calibration


def test_layers_of_other_quantizers_are_not_rescaled(
    site: Path, toy: object, source: str, tmp_path: Path
) -> None:
    toys = [Override("*.mlp.*", "toy")]
    run(source, tmp_path / "tuned", overrides=toys)
    run(source, tmp_path / "untuned", overrides=toys, calibration=config(None))
    tuned, untuned = (
        load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "untuned")
    )
    differing = {name for name in tuned if tuned[name].tolist() != untuned[name].tolist()}
    assert any(name.endswith("self_attn.v_proj.weight.rows") for name in differing)
    assert any(name.endswith("mlp.up_proj.bias") for name in differing)
    assert not [name for name in differing if ".mlp." in name and ".weight." in name]


def test_a_quantizer_that_uses_no_calibration_is_tuned_on_the_text(
    site: Path, scaled: ModuleType, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = packs(scaled, monkeypatch)
    spec = scaled.Scaled.spec
    object.__setattr__(spec, "calibration", "none")
    try:
        errors = run(source, tmp_path / "out").tuning_errors
    finally:
        object.__setattr__(spec, "calibration", "optional")
    assert seen
    assert not any(seen)
    assert errors is not None
    assert all(after < before for before, after in errors.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantizer": "toy"}, OptionError, "tuning: expected a quantizer whose packed weights can be rescaled, got toy;"),
        ({"calibration": config(samples=1)}, DataError, "tuning: expected at least 2 calibration samples"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_and_writes_nothing(
    site: Path, toy: object, source: str, tmp_path: Path, arguments: dict[str, Any], error: type[RequestError], message: str
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        run(source, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_progress_tells_of_tuning_and_ends_at_its_total(
    site: Path, source: str, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    run(source, tmp_path / "out", progress=lambda *progress: told.append(progress))
    done = [(what, done) for what, done, _ in told if what in ("packing", "tuning")]
    assert {what for what, _ in done} == {"packing", "tuning"}
    assert [count for _, count in done] == sorted(count for _, count in done)
    assert told[-1][1] == told[-1][2]


OUTSIDE, IN_BLOCK = 3, 16
"""Parameters outside of the two blocks (embeddings, norm, head), and in one (7 weights, 7 biases, 2 norms)."""


class StoppedError(Exception): ...


def stop(source: str, out: Path, after: int) -> set[str]:
    """A run that ends when it is about to write its ``after``-th parameter. Returns what was written."""
    write, written = ShardWriter.write, list[str]()

    def write_or_stop(self: ShardWriter, name: str, tensors: Any) -> None:
        if len(written) == after:
            raise StoppedError
        written.append(name)
        write(self, name, tensors)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(ShardWriter, "write", write_or_stop)
        run(source, out)
    return set(written)


@pytest.mark.parametrize(
    ("after", "packed_again"),
    [
        (OUTSIDE + 9, 14),
        (OUTSIDE + IN_BLOCK, 7),
        (OUTSIDE + IN_BLOCK + 12, 7),
        (OUTSIDE + 2 * IN_BLOCK - 1, 7),
    ],
)
def test_a_stopped_run_goes_on_block_by_block_with_the_same_bytes(
    after: int, packed_again: int, whole: tuple[Path, QuantizeResult], site: Path, scaled: ModuleType, source: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert len(stop(source, tmp_path / "out", after)) == after
    packed = packs(scaled, monkeypatch)
    result = run(source, tmp_path / "out", resume=True)
    layouts = len(
        open_checkpoint(tmp_path / "out").record.sites
    )  # Quantizer.layout() packs a weight of each
    assert len(packed) - layouts == packed_again
    assert stored(tmp_path / "out") == stored(whole[0])
    errors, expected = result.tuning_errors, whole[1].tuning_errors
    assert errors is not None
    assert expected is not None
    assert errors == {path: expected[path] for path in list(expected)[-len(errors) :]}


STOPPED = """
import os, signal, sys
sys.path.insert(0, {site!r})
import torch
torch.set_num_threads(1)
from modulora_core.checkpoints import shards
from modulora_core.calibration import CalibrationConfig, TuningConfig
from modulora_core.quantization.quantize import quantize
write, count = shards.ShardWriter.write, 0
def write_and_die(self, *arguments):
    global count
    count += 1
    if count > {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
shards.ShardWriter.write = write_and_die
quantize({source!r}, {out!r}, "scaled", seed=1, calibration=CalibrationConfig("pydoc[:10%]", samples=6, seq_len=32, batch_size=2,
         tuning=TuningConfig(epochs=2, learning_rate=2e-2)))
"""  # fmt: skip


def test_a_killed_run_goes_on_with_the_same_bytes(
    whole: tuple[Path, QuantizeResult], site: Path, source: str, tmp_path: Path
) -> None:
    script = STOPPED.format(
        site=str(site), source=source, out=str(tmp_path / "out"), after=OUTSIDE + IN_BLOCK + 3
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert (partial_name(tmp_path / "out") / "written.jsonl").is_file()
    run(source, tmp_path / "out", resume=True)
    assert stored(tmp_path / "out") == stored(whole[0])


def test_a_run_that_resumes_finds_its_total_too(site: Path, source: str, tmp_path: Path) -> None:
    stop(source, tmp_path / "out", OUTSIDE + IN_BLOCK + 5)
    told: list[tuple[str, int, int]] = []
    run(source, tmp_path / "out", resume=True, progress=lambda *progress: told.append(progress))
    assert told[-1][1] == told[-1][2]


@pytest.mark.parametrize("tuning", [None, TuningConfig(epochs=3, learning_rate=2e-2)])
def test_other_tuning_is_not_resumed(
    tuning: TuningConfig | None, site: Path, source: str, tmp_path: Path
) -> None:
    stop(source, tmp_path / "out", OUTSIDE)
    with pytest.raises(CheckpointError, match=r"differs in calibration"):
        run(source, tmp_path / "out", resume=True, calibration=config(tuning))


def test_the_command_line_tunes(
    whole: tuple[Path, QuantizeResult],
    source: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["quantize", source, str(tmp_path / "out"), "-q", "scaled", "--calibration", "pydoc[:10%]", "--samples", "6",
             "--seq-len", "32", "--batch-size", "2", "--seed", "1", "--tune-epochs", "2", "--tune-lr", "0.02"]  # fmt: skip
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tuning_errors"] == {
        path: list(errors) for path, errors in (whole[1].tuning_errors or {}).items()
    }
    assert stored(tmp_path / "out") == stored(whole[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune-epochs", "2"], "--tune-epochs: expected --calibration SOURCE beside it"),
        (["--calibration", "pydoc", "--tune-lr", "0.1"], "--tune-lr: expected --tune-epochs N beside it"),
        (["--calibration", "pydoc", "--tune-epochs", "2", "--tune-lr", "0"], "tuning learning_rate: expected a positive"),
    ],
)  # fmt: skip
def test_options_that_do_not_belong_together_are_refused(
    words: list[str], message: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", source, str(tmp_path / "out"), "-q", "scaled", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
