"""Plans: the three jobs of a request, and what a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from modulora_core.errors import OptionError, ShapeError
from modulora_core.models.ends import EMBEDDINGS, HEAD
from modulora_core.planner import jobs
from modulora_core.planner.helpful import Change, changes, created
from modulora_core.planner.jobs import Job
from modulora_core.planner.packing import quantizing
from modulora_core.planner.rehearsal import Rehearsal, rehearse_training
from modulora_core.planner.request import PlanRequest
from modulora_core.planner.subject import Dense, Subject, configurations, create, open_subject

_MOST_BATCH = 1024
"""Sequences in a batch beyond which nobody asks."""

_MOST_SEQ_LEN = 2**17
"""Tokens of a sequence, where the model doesn't say how many it takes."""

_CLOSE = 0.02
"""A search ends when what fits and what doesn't differ by this share."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model needs with one quantizer.

    Attributes:
        quantizer: its name; several are joined by a plus.
        options: of the first.
        bits_per_weight: over all packed weights.
        packed_bytes: codes and scales.
        quantizing: None for a checkpoint that is packed already.
        fits: whether training does; None without a budget.
        longest_seq_len: with the same batch; None without a budget, 0 where none fits.
        largest_batch_size: with the same sequence length.
        changes: what would help, the most saving first; empty where it fits.
    """

    request: PlanRequest
    quantizer: str
    options: Mapping[str, Any]
    bits_per_weight: float
    packed_bytes: int
    training: Job
    decoding: Job
    quantizing: Job | None
    fits: bool | None = None
    longest_seq_len: int | None = None
    largest_batch_size: int | None = None
    changes: tuple[Change, ...] = field(default_factory=tuple)

    @property
    def jobs(self) -> dict[str, Job]:
        found = {
            "training": self.training,
            "decoding": self.decoding,
            "quantizing": self.quantizing,
        }
        return {name: job for name, job in found.items() if job is not None}

    def to_json(self) -> dict[str, Any]:
        changes = [
            {"change": c.change, "training_bytes": c.nbytes, "saves": c.saves, "fits": c.fits}
            for c in self.changes
        ]
        return {
            "model": self.request.model, "quantizer": self.quantizer, "options": dict(self.options), "device": self.request.device,
            "bits_per_weight": self.bits_per_weight, "packed_bytes": self.packed_bytes, "training_bytes": self.training.nbytes,
            "items": dict(self.training.items), "budget_bytes": self.request.budget, "fits": self.fits,
            "jobs": {name: job.to_json() for name, job in self.jobs.items()}, "longest_seq_len": self.longest_seq_len,
            "largest_batch_size": self.largest_batch_size, "changes": changes,
        }  # fmt: skip


def plan_memory(request: PlanRequest, on_search: Callable[[str], None] | None = None) -> MemoryPlan:
    """Plan for one quantizer, or for a packed checkpoint.

    Args:
        request: the question.
        on_search: is told what is tried, where a budget makes it search.

    Raises:
        OptionError: a quantizer for a model that is packed already, or none for one that isn't; an option of it.
        RequestError: the model, the quantizer or a setting can't be used.
    """
    found = open_subject(request.model, request.revision, mapped=request.config.mapped)
    if isinstance(found, Subject):
        if request.quantizer is not None:
            raise OptionError(
                f"quantizer {request.quantizer}: expected a model that isn't packed, and {request.model} is; leave -q out"
            )
        _refuse_ends(request)
        return _fitted(request, found, on_search)
    if request.quantizer is None:
        raise OptionError(f"model {request.model}: it isn't packed: expected a quantizer, got none")
    subject = found.packed_by(
        create(request.quantizer, request.options), request.head, request.embeddings
    )
    return _fitted(request, subject, on_search, found)


def plan_all(request: PlanRequest) -> list[MemoryPlan]:
    """A plan for every installed quantizer with each configuration that it makes promises for; of a packed checkpoint its own alone.

    Quantizers that can't pack the model's shapes are left out.
    """
    found = open_subject(request.model, request.revision, mapped=request.config.mapped)
    if isinstance(found, Subject):
        return [plan_memory(request)]
    plans = []
    for name, options in configurations():
        quantizer = created(name, options)
        if quantizer is None:
            continue
        try:
            subject = found.packed_by(quantizer, request.head, request.embeddings)
        except ShapeError:
            continue
        asked = replace(request, quantizer=name, options=options)
        rehearsal = rehearse_training(_checked(subject, asked), asked)
        plans.append(_judged(_plan(subject, asked, rehearsal)))
    return plans


def _refuse_ends(request: PlanRequest) -> None:
    for option, choice in ((HEAD, request.head), (EMBEDDINGS, request.embeddings)):
        if choice is not None:
            raise OptionError(
                f"--{option} {choice.label}: expected a model that isn't packed, and {request.model} is; leave it out"
            )


def _plan(
    subject: Subject, request: PlanRequest, rehearsal: Rehearsal, *, packed: bool = False
) -> MemoryPlan:
    recipes = subject.record.recipes
    return MemoryPlan(
        request, "+".join(dict.fromkeys(recipe.quantizer for recipe in recipes)), recipes[0].options,
        subject.record.bits_per_weight, subject.record.nbytes, jobs.training(subject, request, rehearsal),
        jobs.decoding(subject, request), None if packed else quantizing(subject, request),
    )  # fmt: skip


def _checked(subject: Subject, request: PlanRequest) -> Subject:
    """Raises OptionError for sequences that are longer than the model takes."""
    longest = _window(subject)
    if request.config.seq_len > longest:
        raise OptionError(
            f"seq_len {request.config.seq_len}: expected at most {longest}, the context of {request.model}"
        )
    return subject


def _window(subject: Subject) -> int:
    return int(
        getattr(subject.config.get_text_config(), "max_position_embeddings", None) or _MOST_SEQ_LEN
    )


def _judged(plan: MemoryPlan) -> MemoryPlan:
    budget = plan.request.budget
    return plan if budget is None else replace(plan, fits=plan.training.nbytes <= budget)


def _fitted(
    request: PlanRequest,
    subject: Subject,
    on_search: Callable[[str], None] | None,
    dense: Dense | None = None,
) -> MemoryPlan:
    """The plan with what its budget allows; ``dense`` is the model that isn't packed yet."""
    rehearsal = rehearse_training(_checked(subject, request), request)
    plan = _plan(subject, request, rehearsal, packed=dense is None)
    budget = request.budget
    if budget is None:
        return plan

    @cache
    def nbytes(seq_len: int, batch_size: int) -> int:
        if on_search is not None:
            on_search(f"{batch_size} × {seq_len} tokens")
        changed = request.changed(seq_len=seq_len, batch_size=batch_size)
        return jobs.training(subject, changed, rehearse_training(subject, changed)).nbytes

    config = request.config
    longest = _largest(
        lambda n: nbytes(n, config.batch_size),
        budget,
        config.seq_len,
        range(2, _window(subject) + 1),
    )
    largest = _largest(
        lambda n: nbytes(config.seq_len, n), budget, config.batch_size, range(1, _MOST_BATCH + 1)
    )
    judged = replace(_judged(plan), longest_seq_len=longest, largest_batch_size=largest)
    if judged.fits:
        return judged
    helpful = changes(request, judged.training, subject, rehearsal, dense)
    return replace(judged, changes=tuple(helpful))


def _largest(nbytes: Callable[[int], int], budget: int, start: int, allowed: range) -> int:
    """The largest number of ``allowed`` whose bytes are within ``budget``, to within 2 %; 0 if not even the smallest's are.

    Bytes grow with the number, nearly in a line: the next number to try is where the line through two that are known meets the budget.
    """
    known = {start: nbytes(start)}
    n = min(2 * start, allowed[-1]) if known[start] <= budget else allowed[0]
    while True:
        known[n] = nbytes(n)
        low = max((m for m, taken in known.items() if taken <= budget), default=None)
        high = min((m for m, taken in known.items() if taken > budget), default=None)
        if low is None and allowed[0] in known:
            return 0
        if low == allowed[-1] or (
            low is not None and high is not None and high - low <= max(1, int(_CLOSE * low))
        ):
            return low
        n = _next(known, budget, low or 0, high or allowed[-1] + 1)


def _next(known: Mapping[int, int], budget: int, low: int, high: int) -> int:
    """A number between ``low`` and ``high``."""
    (a, at_a), (b, at_b) = sorted(known.items(), key=lambda point: abs(point[1] - budget))[:2]
    met = a + int((budget - at_a) * (b - a) / (at_b - at_a)) if at_a != at_b else (low + high) // 2
    met = min(max(met, low + max(1, int(_CLOSE * low))), high - 1)
    # once the line's number is known it is the next by 2 % that shows whether more fits
    return met if met not in known else (low + high) // 2
