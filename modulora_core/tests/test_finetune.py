"""A finetuning run, end to end: real files, transformers' Trainer, a tiny model packed by an outsider's plugin."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from modulora_core.checkpoint import open_checkpoint
from modulora_core.data import Collator, load_examples
from modulora_core.errors import AdapterError, DataError, ModelError, OptionError, OutputError, WorkError
from modulora_core.finetune import FinetuneResult, finetune
from modulora_core.finetune_config import FinetuneConfig
from modulora_core.layers import LoRALinear
from modulora_core.loading import load
from modulora_core.quantize import quantize
from modulora_core.tests.tiny_tokenizer import make_tokenizer
from modulora_core.training import TrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = [f"Line {n}: the packed weights stay, the adapter learns. " for n in range(40)]
Run = Callable[..., FinetuneResult]


@pytest.fixture(scope="module")
def packed(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, packed by ``toy``."""
    root = tmp_path_factory.mktemp("finetune")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    quantize(str(root / "dense"), root / "packed", "toy")
    return root / "packed"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 windows of 64 tokens, and a shorter one."""
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(SENTENCES))
    return file


@pytest.fixture
def run(packed: Path, text: Path, tmp_path: Path) -> Run:
    """``run(out, **options)`` finetunes into ``tmp_path / out``."""

    def go(
        out: str = "adapter", *, resume: bool = False, on_step: Any = None, **options: Any
    ) -> FinetuneResult:
        return finetune(small(packed, text, tmp_path / out, **options), resume=resume, on_step=on_step)

    return go


def small(model: Path, data: Path, out: Path, **options: Any) -> FinetuneConfig:
    """A run of a second: 8 steps, which are two and a half epochs."""
    chosen = {"model": str(model), "data": str(data), "out": str(out), "batch_size": 2, "grad_accum": 2,
              "seq_len": 64, "steps": 8, "save_every": 2, "lr": 1e-2} | options  # fmt: skip
    return FinetuneConfig.build(chosen)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")  # type: ignore[no-any-return]


def same_adapters(a: Path, b: Path) -> bool:
    first, second = adapter_of(a), adapter_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class StoppedError(Exception):
    """What a test stops a run with."""


def stop_after(step: int) -> Callable[[TrainingStep], None]:
    def on_step(told: TrainingStep) -> None:
        if told.step == step:
            raise StoppedError

    return on_step


# the whole of it


def test_the_loss_falls_and_the_adapter_explains_it(
    run: Run, packed: Path, text: Path, tmp_path: Path
) -> None:
    result = run(steps=30, eval_data=str(text))
    first, last = result.losses[0], result.losses[-1]
    assert len(result.losses) == result.steps == 30
    assert last < 0.7 * first, f"the loss went from {first:.3f} to {last:.3f}"
    assert result.eval_loss is not None

    def loss(adapter: str | None) -> float:
        loaded = load(str(packed), adapter=adapter)
        examples = load_examples(str(text), loaded.tokenizer, seq_len=64)
        batches = [Collator(0)([examples[i] for i in range(start, min(start + 2, len(examples)))])
                   for start in range(0, len(examples), 2)]  # fmt: skip
        with torch.no_grad():
            losses = [(float(loaded.model(**batch).loss), len(batch["input_ids"])) for batch in batches]
        return sum(value * rows for value, rows in losses) / len(examples)

    with_adapter, without = loss(str(tmp_path / "adapter")), loss(None)
    assert with_adapter == pytest.approx(result.eval_loss, rel=1e-5), (
        "saved and loaded again, it is the same model"
    )
    assert with_adapter < 0.7 * without, f"{with_adapter:.3f} with the adapter, {without:.3f} without"


def test_out_holds_an_adapter_the_run_and_a_card(run: Run, tmp_path: Path, packed: Path) -> None:
    run(rank=4, targets="q_proj,v_proj")
    out = tmp_path / "adapter"
    names = {path.name for path in out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "modulora.json", "finetune.yaml",
                     "README.md", "checkpoints"}  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32, 0.1)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "dense", (
        "the model before quantization, by the checkpoint's record"
    )
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| rank | 4 |" in card


def test_the_file_that_a_run_writes_makes_the_same_adapter_again(run: Run, tmp_path: Path) -> None:
    first = run("first")
    again = FinetuneConfig.build({"out": str(tmp_path / "again")}, file=tmp_path / "first" / "finetune.yaml")
    assert finetune(again).losses == first.losses
    assert same_adapters(tmp_path / "first", tmp_path / "again")


def test_another_seed_gives_another_run(run: Run) -> None:
    assert run("first").losses != run("second", seed=1).losses


def test_the_result_has_the_keys_of_the_command_line(run: Run) -> None:
    result = run(steps=2)
    told = result.to_json()
    assert set(told) >= {
        "out",
        "steps",
        "losses",
        "eval_loss",
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert json.loads(json.dumps(told)) == told
    assert result.peak_memory_bytes > 0


# the optimizer's steps


def test_a_steps_loss_is_the_mean_over_its_trained_tokens_however_it_is_cut(
    run: Run, packed: Path, tmp_path: Path
) -> None:
    """Answers of very different lengths: a mean of the batches' means would be another number."""
    rows = [{"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": " ".join(SENTENCES[:2])},
            {"prompt": "x y z", "completion": "w"}, {"prompt": "k", "completion": "and so on"}]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps: list[TrainingStep] = []
    run(data=str(data), steps=1, batch_size=2, grad_accum=2, dropout=0, on_step=steps.append)

    loaded = load(str(packed))
    examples = load_examples(str(data), loaded.tokenizer, seq_len=64)
    total, tokens = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = loaded.model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        tokens += int((labels != -100).sum())
    assert steps[0].loss == pytest.approx(total / tokens, rel=1e-5)
    assert steps[0].tokens == sum(len(example["input_ids"]) for example in examples), "padding doesn't count"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scheduler": "constant", "warmup": 2}, [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ({"scheduler": "linear", "warmup": 0.25}, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"scheduler": "cosine", "warmup": 0}, [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]),
    ],
    ids=["constant", "linear", "cosine"],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    run: Run, options: dict[str, Any], expected: list[float]
) -> None:
    steps: list[TrainingStep] = []
    run(lr=1e-3, on_step=steps.append, **options)
    assert [step.learning_rate / 1e-3 for step in steps] == pytest.approx(expected)
    assert [(step.step, step.total) for step in steps] == [(n, 8) for n in range(1, 9)]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (0.5, 2), (2, 8)])
def test_epochs_are_passes_over_the_data(run: Run, epochs: float, steps: int) -> None:
    """15 examples are 8 batches of at most two, and four steps of two batches."""
    assert run(steps=None, epochs=epochs).steps == steps


def test_gradient_checkpointing_changes_no_loss(run: Run) -> None:
    with_it = run("with", gradient_checkpointing=True, dropout=0.3).losses
    without = run("without", gradient_checkpointing=False, dropout=0.3).losses
    assert with_it == pytest.approx(without, rel=1e-6)


def test_bfloat16_trains_like_float32_with_an_adapter_in_float32(run: Run, tmp_path: Path) -> None:
    exact, rounded = run("exact", dropout=0).losses, run("rounded", dropout=0, dtype="bfloat16").losses
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "rounded").values()} == {torch.float32}


def test_evaluations_come_in_between_and_at_the_end(run: Run, text: Path, tmp_path: Path) -> None:
    result = run(eval_data=str(text), eval_every=3)
    last = Path(get_last_checkpoint(str(tmp_path / "adapter" / "checkpoints")))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert set(evaluated) == {3, 6, 8}
    assert result.eval_loss == evaluated[8]


def test_a_loss_that_is_no_number_ends_the_run_with_the_step(run: Run, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"step \d: the loss is (nan|inf); lower the learning rate"):
        run(lr=1e30, max_grad_norm=0, scheduler="constant", warmup=0)
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_run_goes_on_with_an_adapter(run: Run, tmp_path: Path) -> None:
    first = run("first", rank=4, alpha=16, scheduler="constant", dropout=0, steps=30)
    second = run("second", adapter=str(tmp_path / "first"), scheduler="constant", warmup=0, dropout=0.2)
    assert second.losses[0] < 0.8 * first.losses[0]
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.2)
    assert not same_adapters(tmp_path / "first", tmp_path / "second")


# checkpoints and resuming


def test_a_checkpoint_is_an_adapter_and_holds_nothing_that_runs_code(
    run: Run, packed: Path, tmp_path: Path
) -> None:
    run()
    checkpoints = tmp_path / "adapter" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    last = checkpoints / "checkpoint-8"
    assert same_adapters(last, tmp_path / "adapter")
    model = load(str(packed), adapter=str(last)).model
    assert any(isinstance(module, LoRALinear) for module in model.modules())
    assert {path.name for path in last.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "modulora.json", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "trainer_state.json", "complete.json",
    }  # fmt: skip
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(last / name, weights_only=True)  # raises on anything but tensors and plain values


@pytest.mark.parametrize(
    "stopped", [1, 3, 4, 7], ids=["before-any", "within-an-epoch", "between-epochs", "late"]
)
def test_a_stopped_run_resumes_with_the_losses_of_an_uninterrupted_one(
    run: Run, tmp_path: Path, text: Path, stopped: int
) -> None:
    """With dropout, and evaluations that draw random numbers in between: every generator is restored."""
    options: dict[str, Any] = {"dropout": 0.3, "eval_data": str(text), "eval_every": 3}
    whole = run("whole", **options)
    with pytest.raises(StoppedError):
        run("stopped", on_step=stop_after(stopped), **options)
    steps: list[TrainingStep] = []
    resumed = run("stopped", resume=True, on_step=steps.append, **options)
    assert resumed.losses == whole.losses
    assert resumed.eval_loss == whole.eval_loss
    assert same_adapters(tmp_path / "stopped", tmp_path / "whole")
    # a step is told before it is saved
    assert steps[0].step == (stopped - 1) // 2 * 2 + 1, "it went on from the last checkpoint"


def test_a_run_that_was_killed_resumes_with_the_losses_of_an_uninterrupted_one(
    run: Run, packed: Path, text: Path, toy_root: Path, tmp_path: Path
) -> None:
    whole = run("whole", dropout=0.3)
    code = """if True:
        import json, os, signal, sys
        import torch
        from modulora_core.finetune import finetune
        from modulora_core.finetune_config import FinetuneConfig

        def on_step(step):
            if step.step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        torch.set_num_threads(1)
        finetune(FinetuneConfig.build(json.loads(sys.argv[1])), on_step=on_step)
    """
    config = small(packed, text, tmp_path / "killed", dropout=0.3)
    options = json.dumps(config.model_dump(mode="json", exclude_none=True))
    killed = subprocess.run(
        [sys.executable, "-c", code, options],
        env={**os.environ, "PYTHONPATH": str(toy_root)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "adapter_config.json").exists(), "half a run is no adapter"
    resumed = finetune(config, resume=True)
    assert resumed.losses == whole.losses
    assert same_adapters(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "complete.json").unlink(),
        lambda folder: (folder / "optimizer.pt").write_bytes(b"cut"),
        lambda folder: (folder / "rng_state.pth").unlink(),
    ],
    ids=["unsealed", "cut", "missing"],
)
def test_a_half_written_checkpoint_is_passed_over(
    run: Run, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    whole = run("whole")
    with pytest.raises(StoppedError):
        run("stopped", on_step=stop_after(5))
    damage(tmp_path / "stopped" / "checkpoints" / "checkpoint-4")
    steps: list[TrainingStep] = []
    assert run("stopped", resume=True, on_step=steps.append).losses == whole.losses
    assert steps[0].step == 3


def test_a_run_that_was_stopped_after_its_last_step_only_writes_what_is_missing(
    run: Run, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": 6, "eval_data": str(text)}  # in the middle of an epoch
    whole = run(**options)
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    steps: list[TrainingStep] = []
    resumed = run(resume=True, on_step=steps.append, **options)
    assert steps == []
    assert (resumed.losses, resumed.eval_loss) == (whole.losses, whole.eval_loss)
    assert same_adapters(tmp_path, tmp_path / "adapter")


def test_resume_where_nothing_was_begun_begins(run: Run) -> None:
    assert run("new", resume=True).losses == run("other").losses


# requests that are refused


def test_an_unfinished_run_is_refused_without_resume(run: Run) -> None:
    with pytest.raises(StoppedError):
        run(on_step=stop_after(3))
    with pytest.raises(OutputError, match="it holds an unfinished run; go on with it with --resume"):
        run()


def test_a_finished_adapter_is_never_overwritten(run: Run) -> None:
    run(steps=1)
    for resume in (False, True):
        with pytest.raises(OutputError, match="it holds a finished adapter; choose another name"):
            run(steps=1, resume=resume)


def test_resume_with_other_options_is_refused_with_their_names(run: Run) -> None:
    with pytest.raises(StoppedError):
        run(on_step=stop_after(3))
    with pytest.raises(OptionError, match=r"others: rank 8 → 4; lr 0\.01 → 0\.02"):
        run(resume=True, lr=2e-2, rank=4)


def test_a_folder_with_something_else_is_refused_and_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"expected it new or empty, found 1 entries \(thesis\.tex\)"):
            run(resume=resume)
    assert (tmp_path / "adapter" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "{dense}"}, ModelError, "isn't quantized by modulora.*modulora quantize"),
        ({"model": "./nowhere/at/all"}, ModelError, "no such file or folder"),
        ({"data": "{folder}/absent.txt"}, DataError, r"absent\.txt: expected a file"),
        ({"data": "{folder}/broken.jsonl"}, DataError, r"broken\.jsonl.*2"),
        ({"eval_data": "{folder}/absent.txt"}, DataError, r"absent\.txt: expected a file"),
        ({"seq_len": 129}, OptionError, "seq_len 129: expected at most 128, the max_position_embeddings"),
        ({"targets": "q_porj"}, AdapterError, "target 'q_porj'.*did you mean 'q_proj'"),
        ({"adapter": "./nowhere"}, AdapterError, "adapter ./nowhere: no such folder"),
    ],
    ids=["dense", "no-model", "no-data", "bad-data", "no-eval-data", "window", "target", "adapter"],
)
def test_a_bad_request_is_refused_and_writes_nothing(
    run: Run, packed: Path, tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    places = {"dense": packed.parent / "dense", "folder": tmp_path}
    chosen = {
        name: value.format(**places) if isinstance(value, str) else value for name, value in options.items()
    }
    with pytest.raises(kind, match=message):
        run(**chosen)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU float16 trains with a loss scaler")
def test_float16_on_a_cpu_is_refused(run: Run) -> None:
    with pytest.raises(OptionError, match="dtype float16: training in it takes a GPU"):
        run(dtype="float16")


def test_the_packed_model_is_untouched(run: Run, packed: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in packed.iterdir()}

    before = everything()
    run(steps=2)
    assert everything() == before
    assert open_checkpoint(packed).record.recipes[0].quantizer == "toy"
