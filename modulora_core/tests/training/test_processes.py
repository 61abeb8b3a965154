"""A run in several processes gives the losses and the adapter of one process."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modulora_core import distributed
from modulora_core.cli import main
from modulora_core.cli.failures import report_failure
from modulora_core.cli.terminal import Terminal
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import OptionError, OutputError
from modulora_core.models.installed_formats import file_format
from modulora_core.tests.processes import finetuned, run_in_processes, trained_by_hand
from modulora_core.training.arguments import total_steps
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def options(tunable, tmp_path_factory):
    """A run of 4 steps of 4 examples, with 5 examples to evaluate."""
    folder = tmp_path_factory.mktemp("texts")
    text = pydoc_text()
    (folder / "train.txt").write_text(text[:4000])
    (folder / "eval.txt").write_text(text[50_000:50_600])
    return {
        "model": str(tunable), "data": str(folder / "train.txt"), "dropout": 0.0, "steps": 4,
        "eval_data": str(folder / "eval.txt"), "seq_len": 32, "save_every": 2, "baseline": False,
    }  # fmt: skip


def adapter(out):
    return load_file(out / "adapter_model.safetensors")


def interrupted(run, out):
    """A copy of a finished run as it was after its first checkpoint."""
    shutil.copytree(run / "checkpoints" / "checkpoint-2", out / "checkpoints" / "checkpoint-2")
    shutil.copy(run / "finetune.yaml", out)
    return str(out)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_losses_are_those_of_one_process_and_any_number_resumes(options, tmp_path, shard):
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    expected = finetuned(**options, out=str(one), batch_size=2, grad_accum=2)
    shared = {**options, "shard": shard, "grad_accum": 1}

    def in_processes(number, **more):
        batch = {"batch_size": 4 // number}
        for found in run_in_processes(number, _finetuned, {**shared, **batch, **more}):
            assert found == pytest.approx(expected, abs=1e-4)

    in_processes(2, out=str(two))
    if shard:
        in_processes(4, out=interrupted(two, four), resume=True)
    resumed = interrupted(two, tmp_path / "resumed")
    again = {**options, "out": resumed, "batch_size": 4, "grad_accum": 1, "resume": True}
    assert finetuned(**again) == pytest.approx(expected, abs=1e-4)
    reference = adapter(one)
    assert all(tensor.any() for tensor in reference.values()), "B has moved"
    for folder in (two, Path(resumed), *([four] if shard else [])):
        values = adapter(folder)
        assert values.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(values[name], tensor, rtol=0, atol=1e-4)


def _finetuned(options):
    return finetuned(**options)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_fully_shard_divides_packed_weights(tunable, number):
    ids = torch.arange(48).view(4, 12) + 3
    expected, whole = trained_by_hand(tunable, ids, split=False)
    for losses, part in run_in_processes(number, _trained, tunable, ids):
        assert losses == pytest.approx(expected, abs=1e-4)
        assert whole / number <= part <= whole / number * 1.02


def _trained(folder, ids):
    return trained_by_hand(folder, ids, split=True)


@pytest.mark.slow
def test_a_bad_request_is_one_sentence_once(tunable, tmp_path):
    words = ["finetune", str(tunable), str(tmp_path / "out"), "--data", "none.txt"]
    first, second = run_in_processes(2, _command, words)
    assert first[0] == second[0] == 2
    assert first[1].startswith("error: ")
    assert "none.txt" in first[1]
    assert second[1] == ""
    assert not (tmp_path / "out").exists()


def _command(words):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = main(words)
    return code, printed.getvalue()


def test_an_error_of_one_process_ends_all():
    found = run_in_processes(2, _one_fails)
    assert found == [
        "RequestError: process 1 of 2: expected another disk, got a full one",
        "OptionError: expected another disk, got a full one",
    ]


def _one_fails():
    with distributed.together():
        if distributed.rank() == 1:
            raise OptionError("expected another disk, got a full one")


def test_a_process_that_fails_alone_does_not_wait_for_the_others():
    """They are at work: their next message would be no answer to its own."""
    first, second = run_in_processes(2, _first_fails)
    assert first == (2, "error: expected a new file, got one that exists\n")
    assert second.startswith("RuntimeError"), "its connection is closed"


def _first_fails():
    distributed.join()
    if not distributed.is_first():
        distributed.barrier()
    terminal = Terminal(stderr=io.StringIO())
    code = report_failure(OutputError("expected a new file, got one that exists"), terminal)
    return code, terminal.stderr.getvalue()


@pytest.mark.slow
def test_a_file_that_the_first_process_may_not_write_ends_all(options, tmp_path):
    """The file of the adapter appears during the run."""
    from modulora_toy.single import SingleWriter

    writer = SingleWriter(file_format("a.single").spec)
    writer.merge(options["model"], tmp_path / "model.single", progress=False)
    lora = tmp_path / "lora.single"
    more = {"model": str(tmp_path / "model.single"), "lora_file": str(lora), "batch_size": 2}
    first, second = run_in_processes(2, _overtaken, {**options, **more, "out": str(tmp_path / "o")})
    assert first.startswith(f"OutputError: {lora}: expected a new file")
    assert second == f"RequestError: process 0 of 2: {first.removeprefix('OutputError: ')}"
    assert not (tmp_path / "o" / "adapter_config.json").exists(), "it can be resumed"


def _overtaken(options):
    lora = Path(options["lora_file"])
    finetune(FinetuneConfig.build(options), on_step=lambda _: lora.touch())


@pytest.mark.parametrize(("processes", "steps"), [(1, 8), (2, 4), (3, 3), (8, 1)])
def test_an_epoch_has_fewer_steps_in_more_processes(processes, steps):
    config = FinetuneConfig(model="m", out="o", data=("d",), epochs=1, batch_size=2, grad_accum=1)
    assert total_steps(config, 15, processes) == steps
