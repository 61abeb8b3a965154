"""report.html: its curves, its samples, and what it needs from outside."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modulora_core.adapters.lora import add_lora
from modulora_core.adapters.settings import LoRASettings
from modulora_core.adapters.switching import without_adapter
from modulora_core.checkpoints.loading import load_model, open_packed
from modulora_core.data import load_examples
from modulora_core.data.rendering import IGNORED
from modulora_core.models.sampling import Sampling, continuations
from modulora_core.progress import no_progress
from modulora_core.tests.adapted_models import logits, trained
from modulora_core.tests.tiny_tokenizer import write_jsonl
from modulora_core.training import outputs
from modulora_core.training.chunked_loss import token_losses
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.curves import Curve, curves
from modulora_core.training.finetune import finetune
from modulora_core.training.samples import LONGEST, Sample, _split, answers
from modulora_core.training.trainer import AdapterTrainer

Configure = Callable[..., FinetuneConfig]

pytestmark = pytest.mark.usefixtures("one_thread")

OUTSIDE = re.compile(r"<script|<link|<img|@import|url\(|https?://|\son\w+=", re.IGNORECASE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say <b>{word}</b>", "completion": f" {word}"} for word in "abcdefg"]
    return write_jsonl(tmp_path / "data.jsonl", *rows)  # type: ignore[no-any-return]


def test_a_run_leaves_a_page_that_needs_nothing_else(
    configure: Configure, data: Path, tmp_path: Path
) -> None:
    result = finetune(configure(data=str(data), eval_data=str(data), seq_len=96, report=True))
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert OUTSIDE.search(page) is None
    assert "default-src 'none'" in page
    assert page.count("<svg ") == 5
    assert "prefers-color-scheme: dark" in page
    assert f"{result.eval_loss_before:.3f} → {result.eval_loss:.3f}" in page
    assert result.eval_loss_before == pytest.approx(result.losses[0], rel=0.2)
    assert "<b>a</b>" not in page
    assert page.count("say &lt;b&gt;") == 5
    assert "<span>lr</span><code>0.01</code>" in page


def test_it_can_be_left_out(configure: Configure, text: Path, tmp_path: Path) -> None:
    result = finetune(configure(steps=1, report=False, eval_data=str(text)))
    assert result.eval_loss_before is None
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_the_held_out_loss_is_on_examples_that_no_step_read(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    rows = [{"prompt": f"say {i}", "completion": f" {i * i}"} for i in range(400)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", *rows))
    config = configure(data=data, steps=10, report=True, packing=packing, save_every=5)
    read: list[tuple[bool, str]] = []
    forward = AdapterTrainer.compute_loss, AdapterTrainer.prediction_step

    def noted(number: int) -> Any:
        def step(self: Any, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
            read.extend((number == 0, str(row.tolist())) for row in inputs["input_ids"])
            return forward[number](self, model, inputs, *more, **options)

        return step

    monkeypatch.setattr(AdapterTrainer, "compute_loss", noted(0))
    monkeypatch.setattr(AdapterTrainer, "prediction_step", noted(1))
    result = finetune(config)
    trained = {row.replace(", 0", "") for training, row in read if training}
    held_out = {row.replace(", 0", "") for training, row in read if not training}
    assert result.held_out is not None
    assert (result.held_out.examples, len(held_out)) == (8, 8)
    assert not trained & held_out
    assert result.held_out.after < result.held_out.before
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"{result.held_out.before:.3f} → {result.held_out.after:.3f}" in page
    assert "on 8 examples of the training data that the run did not reach" in page

    def stop(step: object) -> None:
        if step.step == 7:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    again = config.model_copy(update={"out": str(tmp_path / "again")})
    with pytest.raises(KeyboardInterrupt):
        finetune(again, on_step=stop)
    resumed = finetune(again, resume=True)
    assert (resumed.losses, resumed.held_out) == (result.losses, result.held_out)
    silent = config.model_copy(update={"out": str(tmp_path / "silent"), "report": False})
    without = finetune(silent)
    assert (without.losses, without.held_out) == (result.losses, None)


def test_the_held_out_loss_of_joined_examples_is_the_loss_of_each_alone(
    configure: Configure, tunable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"say {i}", "completion": f" {i * i}"} for i in range(400)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", *rows))
    batches: list[dict[str, Any]] = []
    forward = AdapterTrainer.prediction_step

    def noted(self: Any, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        batches.append({**inputs})
        return forward(self, model, inputs, *more, **options)

    monkeypatch.setattr(AdapterTrainer, "prediction_step", noted)
    result = finetune(configure(data=data, steps=10, report=True, packing=True))
    model, losses = load_model(tunable).eval(), []
    for batch in batches:
        for ids, labels, positions in zip(
            batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
        ):
            starts = (positions == 0).nonzero().flatten().tolist()
            for start, end in itertools.pairwise([*starts, len(ids)]):
                part, goals = ids[None, start:end], labels[None, start:end]
                losses += token_losses(model(part).logits, goals)[goals[:, 1:] != IGNORED].tolist()
    assert len(losses) > 2 * 8, "rows have several parts"
    assert result.held_out is not None
    assert result.held_out.before == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_after_an_epoch_the_page_says_how_to_hold_data_out(
    configure: Configure, data: Path, tmp_path: Path
) -> None:
    assert finetune(configure(data=str(data), epochs=1, report=True)).held_out is None
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "No loss is on held-out data." in page


def test_a_resumed_run_has_all_curves_and_one_first_evaluation(
    configure: Configure, text: Path, tmp_path: Path
) -> None:
    config = configure(steps=4, save_every=2, eval_data=str(text), report=True)

    def stop(step: object) -> None:
        if step.step == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    evaluations: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        finetune(config, on_step=stop)
    result = finetune(config, resume=True, on_eval=lambda step, _: evaluations.append(step))
    assert evaluations == [4]
    assert result.eval_loss_before is not None
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count('<circle class="first"') == 5 * 4
    assert page.count('<circle class="second"') == 2


def test_no_later_evaluation_is_called_the_first(
    configure: Configure, text: Path, tmp_path: Path
) -> None:
    """The run began without a report, and so without an evaluation before its first step."""
    config = configure(steps=4, save_every=2, eval_data=str(text), eval_every=2)

    def stop(step: object) -> None:
        if step.step == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, on_step=stop)
    result = finetune(config.model_copy(update={"report": True}), resume=True)
    assert result.eval_loss_before is None
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"→ {result.eval_loss:.3f}" not in page


def test_samples_are_greedy_answers_without_and_with_the_adapter(tunable: Path, text: Path) -> None:
    base: Any = load_model(tunable)
    adapted: Any = trained(load_model(tunable))
    tokenizer = open_packed(tunable).tokenizer()
    examples = load_examples(text, tokenizer, seq_len=64)
    calls: list[Any] = []
    samples = answers(
        adapted, tokenizer, examples, seconds=100, tokens_per_second=1e4,
        show=lambda *call: calls.append(call),
    )  # fmt: skip
    assert len(samples) == 5
    assert calls
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] <= calls[-1][2] == 2 * LONGEST
    greedy = Sampling(LONGEST)

    def words(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    for number, sample in enumerate(samples):
        ids = examples[number * len(examples) // 5]["input_ids"]
        assert (sample.prompt, sample.expected) == (words(ids[:32]), words(ids[32:]))
        for model, answer in ((base, sample.before), (adapted, sample.after)):
            (alone,) = continuations(model, tokenizer, [ids[:32]], greedy)
            assert answer == words(alone)
    assert any(sample.before != sample.after for sample in samples)


@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 1e4}, {"suppress_tokens": [*range(1, 64)]}], ids=str
)
def test_the_models_own_settings_do_not_change_the_answers(
    tunable: Path, text: Path, own: dict[str, Any]
) -> None:
    tokenizer = open_packed(tunable).tokenizer()
    examples = load_examples(text, tokenizer, seq_len=64)

    def answered(**own: Any) -> list[Sample]:
        model: Any = trained(load_model(tunable))
        model.generation_config.update(**own)
        return answers(
            model, tokenizer, examples, seconds=100, tokens_per_second=1e4, show=no_progress
        )

    assert answered(**own) == answered()


def test_infinite_logits_end_no_run_at_its_report(tunable: Path, text: Path) -> None:
    model: Any = trained(load_model(tunable))
    tokenizer = open_packed(tunable).tokenizer()
    examples = load_examples(text, tokenizer, seq_len=64)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.inf)
    (sample, *_) = answers(
        model, tokenizer, examples, seconds=100, tokens_per_second=1e4, show=no_progress
    )
    assert "infinite" in sample.before
    assert "infinite" in sample.after


@pytest.mark.parametrize("window", [32, 49])
def test_a_run_in_a_short_window_has_its_adapter(
    configure: Configure, tunable: Path, tmp_path: Path, window: int
) -> None:
    """An answer has up to 48 tokens: the first window has no room for it, the second one just."""
    model = tmp_path / "short"
    shutil.copytree(tunable, model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "max_position_embeddings": window}))
    finetune(configure(model=str(model), steps=1, report=True))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert ("Sample answers" in page) == (window == 49)


def test_a_failure_of_the_answers_leaves_the_adapter(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(*_: Any, **__: Any) -> list[Sample]:
        raise torch.OutOfMemoryError("no room for a cache")

    monkeypatch.setattr(outputs, "answers", failing)
    finetune(configure(steps=1, report=True))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "Sample answers" not in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "OutOfMemoryError: no room for a cache" in caplog.text


def test_answers_of_a_slow_model_take_the_time_that_they_are_given(
    tunable: Path, text: Path
) -> None:
    """A token of this one takes 50 ms, so that 2 passes of 48 tokens would take 5 seconds."""
    adapted: Any = trained(load_model(tunable))
    tokens = []
    adapted.register_forward_pre_hook(lambda *_: tokens.append(time.sleep(0.05)))
    tokenizer = open_packed(tunable).tokenizer()
    examples = load_examples(text, tokenizer, seq_len=64)
    samples = answers(
        adapted, tokenizer, examples, seconds=1, tokens_per_second=100, show=lambda *_: None
    )
    assert len(tokens) <= 2 * 12, "half a second for each pass, and a token more"
    assert 1 <= len(samples) < 5, "at 100 tokens a second, 5 prompts would take too long"
    assert all(sample.before and sample.after for sample in samples)


def test_compiling_takes_no_time_of_the_answers(tunable: Path, text: Path) -> None:
    adapted: Any = trained(load_model(tunable))
    pauses, tokens = iter([0.6, 0.6]), list[int]()
    adapted.register_forward_pre_hook(lambda *_: time.sleep(next(pauses, 0)))
    tokenizer = open_packed(tunable).tokenizer()
    examples = load_examples(text, tokenizer, seq_len=64)
    answers(
        adapted, tokenizer, examples, seconds=1, tokens_per_second=1e4,
        show=lambda _, done, __: tokens.append(done),
    )  # fmt: skip
    assert max(done for done in tokens if done <= LONGEST) > 2


def test_an_answer_follows_the_prompt_of_the_first_turn() -> None:
    example = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100]}
    assert _split(example) == ([5, 6], [7, 8])


def _logits_without(model: torch.nn.Module) -> torch.Tensor:
    with without_adapter(model):
        return logits(model)


def test_adapters_are_active_again_afterwards(tunable: Path) -> None:
    model = load_model(tunable)
    base = logits(model)
    add_lora(model, LoRASettings(rank=2), "other")
    before = logits(trained(model))
    assert not torch.equal(before, base)
    assert torch.equal(_logits_without(model), base)
    assert torch.equal(logits(model), before)


# curves


def test_a_curve_places_its_points_between_round_ticks() -> None:
    svg = Curve("Loss", {"": [(1, 0.9), (2, 3.9), (3, 2.0)]}).svg
    assert re.findall(r">([\d.]+)</text>", svg) == ["0", "1", "2", "3", "4", "1", "3"]
    xs, ys = zip(*re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg), strict=True)
    assert [float(x) for x in xs] == sorted(float(x) for x in xs)
    assert float(ys[1]) < float(ys[2]) < float(ys[0]), "a larger value is higher"


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [1e-9, 1e-9], [-1.0, -1.0], [2.0]])
def test_level_and_single_values_have_a_curve(values: list[float]) -> None:
    svg = Curve("", {"": [(step, value) for step, value in enumerate(values)]}).svg
    assert "nan" not in svg
    assert svg.count("<circle") == len(values)


def test_a_long_run_has_few_points_and_nan_has_none() -> None:
    history = [{"step": step, "loss": float(step)} for step in range(10_000)]
    (curve,) = curves([*history, {"step": 10_000, "loss": float("nan")}])
    (line,) = re.findall(r'points="([^"]+)"', curve.svg)
    assert len(line.split()) <= 300
