"""What to change where training doesn't fit: each setting alone, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modulora_core import registry
from modulora_core.errors import ModuLoRAError, OptionError, RequestError, ShapeError
from modulora_core.models.ends import EMBEDDINGS, HEAD
from modulora_core.planner import jobs
from modulora_core.planner.jobs import Job
from modulora_core.planner.rehearsal import Rehearsal, rehearse_training
from modulora_core.planner.request import PlanRequest
from modulora_core.planner.resident import packed_in_memory
from modulora_core.planner.subject import Dense, Subject, configurations, create
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer

_SAME_STEP = frozenset({"optimizer", "offload_optimizer", "mapped"})
"""Settings that change nothing in what a forward and a backward allocate."""

_DENSE_BITS = 16
"""From here on a quantizer packs nothing."""

_WORTH = 2**20
"""Bytes that a change must save to be told."""


@dataclass(frozen=True, slots=True)
class Change:
    """Another setting, and what it does.

    Attributes:
        change: as words of the command line.
        nbytes: that training takes then.
        saves: bytes.
        fits: whether that is within the budget.
    """

    change: str
    nbytes: int
    saves: int
    fits: bool


def changes(
    request: PlanRequest, training: Job, subject: Subject, rehearsal: Rehearsal, dense: Dense | None
) -> Iterator[Change]:
    """Settings that save memory, each alone, the most saving first.

    Args:
        training: as ``request`` has it.
        subject: the packed model; dense: the model that isn't packed yet, None for a checkpoint.
        rehearsal: of ``request``.
    """
    found = []
    for words, fields in _other_settings(request, subject):
        try:
            changed = request.changed(**fields)
        except OptionError:  # it doesn't go together with the rest
            continue
        anew = rehearsal if _SAME_STEP.issuperset(fields) else rehearse_training(subject, changed)
        found.append((words, jobs.training(subject, changed, anew).nbytes))
    if dense is not None:
        found += [*_other_quantizers(request, training, dense), *_packed_ends(request, dense)]
    budget, before = request.budget or 0, training.nbytes
    worth = [Change(words, n, before - n, n <= budget) for words, n in found if before - n > _WORTH]
    yield from sorted(worth, key=lambda change: -change.saves)


def _other_settings(request: PlanRequest, subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
    config = request.config
    if request.device == "cpu" and not config.mapped and not subject.foreign:
        yield "--mapped", {"mapped": True}
    if not config.gradient_checkpointing:
        yield "--gradient-checkpointing", {"gradient_checkpointing": True}
    elif not config.offload_activations:
        yield "--offload-activations", {"offload_activations": True}
    for form in ("none", "rounded"):
        if config.keep_products not in ("none", form):
            yield f"--keep-products {form}", {"keep_products": form}
    if config.batch_size > 1:
        accumulated = config.grad_accum * config.batch_size
        yield (
            f"--batch-size 1 --grad-accum {accumulated}",
            {"batch_size": 1, "grad_accum": accumulated},
        )
    if config.seq_len > 256:
        yield f"--seq-len {config.seq_len // 2}", {"seq_len": config.seq_len // 2}
    if request.dtype == "float32":
        yield "--dtype bfloat16", {"dtype": "bfloat16"}
    if config.optimizer == "adamw":
        yield "--optimizer adamw-8bit", {"optimizer": "adamw-8bit"}
    if not config.offload_optimizer:
        yield "--offload-optimizer", {"offload_optimizer": True}
    if config.rank > 8:
        yield "--rank 8", {"rank": 8}
    if not config.apply_gradients_at_once:
        at_once = {"apply_gradients_at_once": True, "grad_accum": 1, "max_grad_norm": 0.0}
        yield "--apply-gradients-at-once --grad-accum 1 --max-grad-norm 0", at_once


def _other_quantizers(
    request: PlanRequest, training: Job, dense: Dense
) -> Iterator[tuple[str, int]]:
    """Smaller ones, in each configuration that they make promises for. Their products take about the same memory as this one's."""
    before = training.items.get("packed_codes", 0) + training.items.get("packed_scales", 0)
    for name, options in configurations():
        quantizer = created(name, options)
        if quantizer is None:
            continue
        try:
            subject = dense.packed_by(quantizer, request.head, request.embeddings)
        except ShapeError:
            continue
        words = " ".join([f"-q {name}", *(f"-o {key}={value}" for key, value in options.items())])
        yield (
            words,
            training.nbytes - before + packed_in_memory(subject, mapped=request.config.mapped),
        )


def _packed_ends(request: PlanRequest, dense: Dense) -> Iterator[tuple[str, int]]:
    """Each end packed that isn't, and both, by the installed quantizer of most bits that needs no calibration: it harms least."""
    offered = [
        (max(entry.spec.bits), entry.name)
        for entry in registry.entries()
        if entry.status == "ok"
        and entry.spec is not None
        and entry.spec.calibration == "none"
        and max(entry.spec.bits) < _DENSE_BITS
    ]
    if not offered or request.quantizer is None:
        return
    choice = Choice(max(offered)[1])
    open_ends = [
        option
        for option, taken in ((HEAD, request.head), (EMBEDDINGS, request.embeddings))
        if taken is None
    ]
    for options in [[option] for option in open_ends] + ([open_ends] if len(open_ends) > 1 else []):
        head = choice if HEAD in options else request.head
        embeddings = choice if EMBEDDINGS in options else request.embeddings
        changed = replace(request, head=head, embeddings=embeddings)
        try:
            subject = dense.packed_by(create(request.quantizer, request.options), head, embeddings)
        except RequestError:  # a model without such an end, or of another shape than it takes
            continue
        words = " ".join(f"--{option} {choice.label}" for option in options)
        yield words, jobs.training(subject, changed, rehearse_training(subject, changed)).nbytes


def created(name: str, options: Mapping[str, Any]) -> Quantizer | None:
    """None where it can't be used."""
    try:
        return create(name, options)
    except ModuLoRAError:
        return None
