"""Write report.html of a finetuning run: one page that needs no other file and no script."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.curves import curves
from modulora_core.training.held_out import HeldOut
from modulora_core.training.losses import eval_loss_before, loss_in_words
from modulora_core.training.samples import LONGEST, Sample
from modulora_core.version import VERSION

REPORT_FILE = "report.html"


def report(
    config: FinetuneConfig,
    checkpoint: PackedCheckpoint,
    history: Sequence[Mapping[str, float]],
    samples: Sequence[Sample],
    *,
    model: str,
    seconds: float,
    peak_memory_bytes: int,
    sampled: str,
    held_out: HeldOut | None = None,
) -> str:
    """The text of the page.

    Args:
        config: the run; checkpoint: its model.
        history: Trainer's ``log_history``.
        samples: answers without and with the adapter.
        model: the packed model, for commands.
        seconds: the duration of training; peak_memory_bytes: the peak of loading and training.
        sampled: ``"evaluation"`` or ``"training"``, the data of the samples' prompts.
        held_out: the loss on examples that the run did not reach.
    """
    quantizers = ", ".join(dict.fromkeys(g["quantizer"] for g in checkpoint.record.quantizers()))
    settings = {
        name: ", ".join(value) if isinstance(value, list) else value
        for name, value in config.model_dump(mode="json", exclude_none=True).items()
        if value not in ([], {})
    }
    return template(Path(__file__).with_name(f"{REPORT_FILE}.jinja")).render(
        title=f"Finetuning of {checkpoint.record.source.get('name') or checkpoint.name}",
        subtitle=f"A LoRA adapter, trained with {config.method.upper()} on weights quantized with "
        f"{quantizers} ({checkpoint.record.bits_per_weight:.2f} bits per weight).",
        tiles=_tiles(history, seconds, peak_memory_bytes, held_out),
        losses=_losses(sampled, held_out),
        curves=curves(history),
        samples=samples,
        sampled=sampled,
        longest=LONGEST,
        commands=[
            f"modulora {name} {shlex.quote(model)} {words}{shlex.quote(config.out)}"
            for name, words in (
                ("chat", "--adapter "),
                ("evaluate", "--adapter "),
                ("merge", "MERGED --adapter "),
            )
        ],
        settings=settings,
        version=VERSION,
    )


def _losses(sampled: str, held_out: HeldOut | None) -> str:
    """Say on which data the losses are."""
    if sampled == "evaluation":
        return "The evaluation loss is on data that the run did not train on."
    if held_out is not None:
        return (
            f"The held-out loss is on {held_out.examples} examples of the training data that the "
            "run did not reach, without and with the adapter."
        )
    return (
        "No loss is on held-out data. For one, leave a part out: --data 'SOURCE[:95%]' "
        "--eval-data 'SOURCE[95%:]'."
    )


def _tiles(
    history: Sequence[Mapping[str, float]],
    seconds: float,
    peak_memory_bytes: int,
    held_out: HeldOut | None,
) -> dict[str, str]:
    steps = [entry for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    change = loss_in_words([entry["loss"] for entry in steps], 3).partition(" (")[0]
    tiles = {"Steps": f"{len(steps):,}", "Training loss": change.removeprefix("loss ")}
    if evaluations:
        before = eval_loss_before(history)
        begin = "" if before is None else f"{before:.3f} → "
        tiles["Evaluation loss"] = f"{begin}{evaluations[-1]:.3f}"
    if held_out is not None:
        tiles["Held-out loss"] = f"{held_out.before:.3f} → {held_out.after:.3f}"
    tiles["Tokens"] = f"{steps[-1]['num_input_tokens_seen']:,.0f}"
    minutes, rest = divmod(round(seconds), 60)
    tiles["Duration"] = f"{minutes} min {rest} s"
    tiles["Peak memory"] = f"{peak_memory_bytes / 2**30:.2f} GiB"
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
