"""Write report.html of a finetuning run: one page that needs no other file and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from modulora_compare.report.curves import curves
from modulora_core.training.loss_trend import eval_loss_before, loss_in_words
from modulora_core.training.run_log import HeldOut
from modulora_core.version import VERSION

REPORT_FILE = "report.html"

LONGEST = 48
"""Tokens of a sample answer."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, the answer in the data, and the model's answers.

    Attributes:
        before: the answer without the adapter; after: the answer with it.
    """

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The facts of a run.

    Attributes:
        history: Trainer's ``log_history``.
        settings: the settings by name; empty ones are left out.
        seconds: the duration of training; peak_memory_bytes: the peak of loading and training.
        held_out: the loss on examples that the run did not reach.
        samples: answers without and with the adapter; sampled: ``"evaluation"`` or ``"training"``,
            the data of their prompts.
        commands: the commands that use the adapter.
    """

    title: str
    subtitle: str
    history: Sequence[Mapping[str, float]]
    settings: Mapping[str, Any]
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    held_out: HeldOut | None = None
    samples: Sequence[Sample] = ()
    sampled: str = "training"
    commands: Sequence[str] = ()


def page(run: Run) -> str:
    """The text of the page."""
    settings = {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        for name, value in run.settings.items()
        if value is not None and value not in ([], (), {})
    }
    return template(Path(__file__).with_name(f"{REPORT_FILE}.jinja")).render(
        title=run.title, subtitle=run.subtitle, tiles=_tiles(run), losses=_losses(run),
        curves=curves(run.history), samples=run.samples, sampled=run.sampled, longest=LONGEST,
        commands=run.commands, settings=settings, version=VERSION,
    )  # fmt: skip


def _losses(run: Run) -> str:
    """Say on which data the losses are."""
    if any("eval_loss" in entry for entry in run.history):
        return "The evaluation loss is on data that the run did not train on."
    if run.held_out is not None:
        return (
            f"The held-out loss is on {run.held_out.examples} examples of the training data that "
            "the run did not reach, without and with the adapter."
        )
    advice = " To measure one, leave a part out: --data 'SOURCE[:95%]' --eval-data 'SOURCE[95%:]'."
    return "No loss was measured on held-out data." + (advice if run.commands else "")


def _tiles(run: Run) -> dict[str, str]:
    history = run.history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    tokens = [e["num_input_tokens_seen"] for e in history if "num_input_tokens_seen" in e]
    tiles = {"Steps": f"{max((entry['step'] for entry in history), default=0):,.0f}"}
    if losses:
        change = loss_in_words(losses, 3).partition(" (")[0]
        tiles["Training loss"] = change.removeprefix("loss ")
    if evaluations:
        first = eval_loss_before(history)
        begin = "" if first is None else f"{first:.3f} → "
        tiles["Evaluation loss"] = f"{begin}{evaluations[-1]:.3f}"
    if run.held_out is not None:
        before, after = run.held_out.before, run.held_out.after
        tiles["Held-out loss"] = f"{before:.3f} → {after:.3f}"
    if tokens:
        tiles["Tokens"] = f"{tokens[-1]:,.0f}"
    if run.seconds is not None:
        minutes, rest = divmod(round(run.seconds), 60)
        tiles["Duration"] = f"{minutes} min {rest} s"
    if run.peak_memory_bytes is not None:
        tiles["Peak memory"] = f"{run.peak_memory_bytes / 2**30:.2f} GiB"
    return tiles


@cache
def template(path: Path) -> Template:
    """The page whose template is this file. Its style sheet is page.css."""
    environment = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(path.name)
