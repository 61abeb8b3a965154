"""A run is resumed from its last whole checkpoint, with the losses of an uninterrupted run."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer import safe_globals

from modulora_core.data.sources import pydoc_text
from modulora_core.errors import AdapterError, OptionError, OutputError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.tests.stopped_runs import stop_finetune
from modulora_core.training.checkpoints import latest_checkpoint, remove_half_written, seal
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune
from modulora_core.training.interruption import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(pydoc_text()[:1000])
    return folder


@pytest.fixture(scope="module")
def run(tunable, root):
    """Makes a run of 9 steps over several epochs, with dropout, scales and evaluations."""
    text = str(root / "text.txt")
    defaults = {"model": str(tunable), "data": text, "eval_data": text, "eval_every": 3, "steps": 9,
                "batch_size": 2, "grad_accum": 2, "seq_len": 64, "lr": 1e-2, "dropout": 0.2,
                "save_every": 2, "train_scales": True, "baseline": False}  # fmt: skip
    return lambda out, **options: FinetuneConfig.build(
        {**defaults, "out": str(root / out), **options}
    )


@pytest.fixture(scope="module")
def whole(run, one_thread):
    """The uninterrupted run."""
    return finetune(run("whole"))


@pytest.fixture
def config(run, request):
    """The same run in a folder of the test's own."""
    return run(request.node.name)


def changed(config, **options):
    return FinetuneConfig.build({**config.model_dump(exclude_unset=True), **options})


def outcome(result):
    names = ("adapter_model.safetensors", "modulora_scales.safetensors")
    files = [(Path(result.out) / name).read_bytes() for name in names]
    return result.losses, result.eval_loss, files


class Signal(TrainerCallback):
    """Sends a signal to this process before a block of the fifth step runs for the nth time.

    Attributes:
        runs: how often a block began to run after the signal.
    """

    def __init__(self, number, block, nth):
        self.number, self.block, self.nth, self.runs = number, block, nth, 0

    def on_step_begin(self, args, state, control, *, model, **_):
        if state.global_step == 4:
            for block in model.model.layers:
                block.self_attn.register_forward_pre_hook(self.before)

    def before(self, attention, _):
        self.runs += self.nth == 0
        if attention.layer_idx == self.block and self.nth:
            self.nth -= 1
            if self.nth == 0:
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "block", "nth"),
    [
        pytest.param(signal.SIGTERM, 0, 1, id="forward"),
        pytest.param(signal.SIGINT, 1, 2, id="recomputation in the backward"),
    ],
)
def test_a_signal_ends_a_run_at_its_next_block_and_its_last_whole_step_is_kept(
    config, whole, number, block, nth, caplog
):
    before, sent = signal.getsignal(number), Signal(number, block, nth)
    config = changed(config, save_every=100)
    with pytest.raises(Interrupted) as caught:
        finetune(config, callbacks=[sent])
    assert (sent.nth, sent.runs) == (0, 0)
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    (said,) = [each for each in caplog.messages if each.startswith(number.name)]
    assert "the run stops" in said
    assert "a second signal stops it at once" in said
    assert latest_checkpoint(Path(config.out) / "checkpoints").name == "checkpoint-4"
    assert outcome(finetune(config, resume=True)) == outcome(whole)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:-1] + b"\1"])
def test_a_damaged_checkpoint_is_ignored(config, whole, damage):
    file = stop_finetune(config, 7) / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(damage(file.read_bytes()))
    steps = []
    resumed = finetune(config, resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [5, 6, 7, 8, 9]
    assert outcome(resumed) == outcome(whole)


def test_a_run_is_not_resumed_on_another_base(run, tunable, tmp_path):
    base = Path(shutil.copytree(tunable, tmp_path / "base"))
    config = run("of-another", model=str(base))
    stop_finetune(config, 3)
    (path,) = base.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="expected the base that it began with"):
        finetune(config, resume=True)


def test_a_run_without_a_checkpoint_starts_again(config, whole):
    stop_finetune(config, 1)
    assert outcome(finetune(config, resume=True)) == outcome(whole)


def test_a_run_that_was_killed_after_its_last_step_only_writes_its_adapter(config, whole):
    shutil.copytree(whole.out, config.out)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (Path(config.out) / name).unlink()
    steps = []
    assert outcome(finetune(config, resume=True, on_step=steps.append)) == outcome(whole)
    assert steps == []


def test_an_unfinished_run_is_refused_without_resume_and_with_other_options(config):
    stop_finetune(config, 3)
    with pytest.raises(OutputError, match="an unfinished run; continue it with --resume"):
        finetune(config)
    other = changed(config, lr=2e-2, train_scales=False)
    with pytest.raises(
        OptionError, match=r"got others: train_scales True → False; lr 0\.01 → 0\.02; to train"
    ):
        finetune(other, resume=True)


def test_a_checkpoint_is_an_adapter_and_has_no_pickle_that_runs_code(config, tunable):
    checkpoint = stop_finetune(config, 3) / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "complete.json", "modulora.json",
        "modulora_scales.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json",
    }  # fmt: skip
    for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        with safe_globals():  # for numpy's random state, as transformers loads it
            torch.load(file, weights_only=True)
    assert len(load_adapter(load_model(tunable), checkpoint)) == 14


def test_only_whole_checkpoints_are_used_and_kept(tmp_path):
    for step in (2, 10, 11, 12, 13):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"...")
        if step != 12:
            seal(folder)
    (tmp_path / "checkpoint-11" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-13" / "complete.json").write_text('{"files": 5}')
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    remove_half_written(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-10"}
    assert latest_checkpoint(tmp_path / "none") is None


def test_a_run_is_not_resumed_on_other_examples(config, tmp_path):
    text = "".join(f"A line of text with the number {n}.\n" for n in range(60))
    data, held = tmp_path / "data.txt", tmp_path / "held.txt"
    for file in (data, held):
        file.write_text(text)
    config = config.model_copy(update={"data": str(data), "eval_data": str(held)})
    stop_finetune(config, 5)
    other, backwards = text.replace("7", "8"), "".join(sorted(text.splitlines(True))[::-1])
    for file, new, name in (
        (data, other, "train"),
        (data, backwards, "train"),
        (held, other, "eval"),
    ):
        file.write_text(new)
        with pytest.raises(OptionError, match=f"the {name} examples that the run began with"):
            finetune(config, resume=True)
        file.write_text(text)
    assert finetune(config, resume=True).steps == config.steps
