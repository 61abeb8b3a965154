"""Checkpoints of a run in training, and going on from them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.trainer_pt_utils import safe_globals

from modulora_core.adapters.lora import load_adapter
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import OptionError, OutputError
from modulora_core.training.checkpoints import latest_checkpoint, remove_half_written, seal
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import FinetuneResult, finetune
from modulora_core.training.trainer import TrainingStep

Configure = Callable[..., FinetuneConfig]

pytestmark = pytest.mark.usefixtures("one_thread")

KILLED = """
import os, signal, sys
import torch
from modulora_core.training.finetune import finetune
from modulora_core.training.config import FinetuneConfig

torch.set_num_threads(1)

def on_step(step):
    if step.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

finetune(FinetuneConfig.build({}, file=sys.argv[1]), on_step=on_step)
"""


class Stop(Exception):  # noqa: N818  # an interruption, not an error
    """What ends a run in these tests where a kill isn't needed."""


def stop_at(number: int) -> Callable[[TrainingStep], None]:
    def on_step(step: TrainingStep) -> None:
        if step.step == number:
            raise Stop

    return on_step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(pydoc_text()[:1000])
    return folder


@pytest.fixture(scope="module")
def configure(tunable: Path, root: Path) -> Configure:
    """A run of 9 steps over several epochs, with dropout, evaluations and a checkpoint every 2 steps."""
    text = str(root / "text.txt")
    defaults = {"model": str(tunable), "data": text, "eval_data": text, "eval_every": 3, "steps": 9,
                "batch_size": 2, "grad_accum": 2, "seq_len": 64, "lr": 1e-2, "dropout": 0.2,
                "save_every": 2}  # fmt: skip
    return lambda out, **options: FinetuneConfig.build(
        {**defaults, "out": str(root / out), **options}
    )


@pytest.fixture(scope="module")
def whole(configure: Configure, one_thread: None) -> FinetuneResult:
    """The run, uninterrupted."""
    return finetune(configure("whole"))


@pytest.fixture
def config(configure: Configure, request: pytest.FixtureRequest) -> FinetuneConfig:
    """The same run in a folder of the test's own."""
    return configure(request.node.name)


def weights(result: FinetuneResult) -> bytes:
    return (Path(result.out) / "adapter_model.safetensors").read_bytes()


def interrupt(config: FinetuneConfig, step: int) -> Path:
    """Start a run and stop it. Returns the folder of its checkpoints."""
    with pytest.raises(Stop):
        finetune(config, on_step=stop_at(step))
    return Path(config.out) / "checkpoints"


def test_a_killed_run_goes_on_with_the_losses_of_an_uninterrupted_one(
    config: FinetuneConfig, whole: FinetuneResult, toy_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run.yaml"), "7"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(toy_root)},
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    checkpoints = Path(config.out) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]

    steps: list[int] = []
    resumed = finetune(config, resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [7, 8, 9], "what was done isn't done again"
    assert resumed.losses == whole.losses
    assert resumed.eval_loss == whole.eval_loss
    assert weights(resumed) == weights(whole)


def _truncate(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [_truncate, lambda c: (c / "rng_state.pth").unlink(), lambda c: (c / "complete.json").unlink()],
    ids=["truncated", "missing", "unsealed"],
)
def test_a_half_written_checkpoint_is_ignored(
    config: FinetuneConfig, whole: FinetuneResult, damage: Callable[[Path], object]
) -> None:
    damage(interrupt(config, 7) / "checkpoint-6")
    steps: list[int] = []
    resumed = finetune(config, resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [5, 6, 7, 8, 9]
    assert resumed.losses == whole.losses


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    config: FinetuneConfig, whole: FinetuneResult
) -> None:
    interrupt(config, 1)
    assert finetune(config, resume=True).losses == whole.losses


def test_a_run_that_was_killed_after_its_last_step_only_writes_its_adapter(
    config: FinetuneConfig, whole: FinetuneResult
) -> None:
    shutil.copytree(whole.out, config.out)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (Path(config.out) / name).unlink()
    steps: list[TrainingStep] = []
    resumed = finetune(config, resume=True, on_step=steps.append)
    assert steps == []
    assert (resumed.losses, resumed.eval_loss) == (whole.losses, whole.eval_loss)
    assert weights(resumed) == weights(whole)


def test_resuming_where_nothing_was_begun_begins(configure: Configure) -> None:
    assert finetune(configure("fresh", steps=1), resume=True).steps == 1


def test_an_unfinished_run_is_refused_without_resume_and_with_other_options(
    config: FinetuneConfig, configure: Configure, request: pytest.FixtureRequest
) -> None:
    interrupt(config, 3)
    with pytest.raises(
        OutputError, match="it holds an unfinished run; go on with it with --resume"
    ):
        finetune(config)
    with pytest.raises(
        OptionError, match=r"got others: rank 8 → 4; lr 0\.01 → 0\.02; to train with these, choose"
    ):
        finetune(configure(request.node.name, lr=2e-2, rank=4), resume=True)


@pytest.mark.parametrize("resume", [False, True], ids=["anew", "resumed"])
def test_a_run_that_left_no_whole_checkpoint_is_begun_anew_with_other_options(
    config: FinetuneConfig, configure: Configure, request: pytest.FixtureRequest, resume: bool
) -> None:
    """As after a loss that is no number in the first steps: lower the learning rate, and go."""
    (interrupt(config, 1) / "checkpoint-2").mkdir(parents=True)
    lower = configure(request.node.name, lr=1e-3, steps=1)
    assert finetune(lower, resume=resume).steps == 1
    assert FinetuneConfig.build({}, file=Path(lower.out) / "finetune.yaml") == lower
    assert [path.name for path in (Path(lower.out) / "checkpoints").iterdir()] == ["checkpoint-1"]


def test_a_run_is_not_begun_anew_among_somebody_elses_files(config: FinetuneConfig) -> None:
    interrupt(config, 1)
    (Path(config.out) / "README.md").write_text("mine")
    with pytest.raises(
        OutputError, match=r"before its first checkpoint, found 1 other entries \(README.md\)"
    ):
        finetune(config)
    assert (Path(config.out) / "README.md").read_text() == "mine"


def test_a_checkpoint_holds_the_adapter_and_no_pickle_that_runs_code(
    config: FinetuneConfig, tunable: Path
) -> None:
    checkpoint = interrupt(config, 3) / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "complete.json", "modulora.json", "optimizer.pt",
        "rng_state.pth", "scheduler.pt", "trainer_state.json",
    ]  # fmt: skip
    for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        with safe_globals():  # numpy's random state; transformers loads with the same list
            torch.load(file, weights_only=True)
    assert len(load_adapter(load_model(tunable), checkpoint)) == 14


def test_the_last_whole_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"...")
        seal(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    remove_half_written(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-10"}
    assert latest_checkpoint(tmp_path / "none") is None


def test_two_runs_do_not_write_one_folder(configure: Configure) -> None:
    """If this fails: a second run, begun before the first has a checkpoint, starts over in its folder, and both write there."""
    config = configure("taken")
    tried: list[str] = []

    def begin_another(step: TrainingStep) -> None:
        if step.step == 1:
            with pytest.raises(OutputError) as refused:
                finetune(config, resume=True)
            tried.append(str(refused.value))

    result = finetune(config, on_step=begin_another)
    assert "another run is writing it" in tried[0]
    assert len(result.losses) == config.steps
