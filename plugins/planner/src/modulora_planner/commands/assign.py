"""``modulora assign``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from modulora_core.cli import arguments as shared
from modulora_core.cli import quantize as packing
from modulora_core.cli.arguments import argument, option, parse_choice
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import next_commands

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modulora_planner.budget.assign import Assigned

PANELS = {
    "Layers": ("include", "exclude", "quantize_head", "quantize_embeddings"),
    "Calibration": ("samples", "seq_len", "batch_size", "spill"),
}

File = Annotated[Path, argument("FILE.yaml", "The assignment to write.")]
StoredBudget = Annotated[
    int,
    option(
        "--budget SIZE", "Most bytes of all stored tensors, such as 3GB.", parser=shared.to_bytes
    ),
]
Choices = Annotated[
    list[str],
    option("--choices NAME[:KEY=VALUE,...]", "Quantizers to choose from. Repeat it for each."),
]
Calibration = Annotated[
    str,
    option("--calibration SOURCE", "Text to measure on: a file, a Hub dataset, or pydoc."),
]


def command(
    model: shared.Model,
    file: File,
    budget: StoredBudget,
    choices: Choices,
    calibration: Calibration,
    quality: packing.Words = "balanced",
    include: packing.Include = [],
    exclude: packing.Exclude = [],
    quantize_head: shared.Head = None,
    quantize_embeddings: shared.Embeddings = None,
    samples: packing.Samples = None,
    seq_len: packing.SeqLen = None,
    batch_size: packing.BatchSize = None,
    spill: packing.Spill = None,
    device: shared.Device = None,
    seed: shared.Seed = 0,
    resume: shared.Resume = False,
) -> Report:
    """Choose a quantizer for each layer, within a budget of bytes.

    The command measures the error of each choice for each layer on the calibration text, and
    minimizes the sum of errors. The budget covers all stored tensors. `modulora quantize MODEL OUT
    --assignment FILE.yaml` then packs the model; edit the file before if you like.

    Examples:
        modulora assign MODEL a.yaml --budget 3GB --choices A --choices B --calibration pydoc
    """
    from modulora_core.calibration import CalibrationConfig
    from modulora_core.registry import Choice

    offered = [Choice.parse(choice, "--choices") for choice in choices]
    head = parse_choice(quantize_head, "--quantize-head")
    embeddings = parse_choice(quantize_embeddings, "--quantize-embeddings")
    settings = {"samples": samples, "seq_len": seq_len, "batch_size": batch_size, "spill": spill}
    given = {name: value for name, value in settings.items() if value is not None}
    text = CalibrationConfig(calibration, **given)  # type: ignore[arg-type]  # its own check
    with terminal().progress("reading", "bytes") as show:
        from modulora_planner.budget.assign import assign
        from modulora_planner.budget.search import Budget

        found = assign(
            model, file, Budget(budget, offered), calibration=text,
            quality=quality,  # type: ignore[arg-type]  # checked there
            include=include, exclude=exclude, head=head, embeddings=embeddings,
            device=device, seed=seed, resume=resume, progress=show,
        )  # fmt: skip
    words = [
        "modulora quantize",
        shlex.quote(model),
        "PACKED --assignment",
        shlex.quote(found.file),
    ]
    if found.calibrated:
        words.append(f"--calibration {shlex.quote(calibration)}")
        words += [f"--samples {samples}"] * (samples is not None)
        words += [f"--seq-len {seq_len}"] * (seq_len is not None)
    words += [f"--quality {quality}"] * (quality != "balanced")
    words += [f"--seed {seed}"] * (seed != 0)
    return Report(found.to_json(), _text(found, " ".join(words)))


def _text(found: Assigned, following: str) -> RenderableType:
    from rich.console import Group

    from modulora_planner.commands.tables import allocation_tables

    shown = (
        [f"{found.file}: it is finished; nothing is left to resume"]
        if found.table is None
        else allocation_tables(found.table)
    )
    return Group(*shown, next_commands(following))
