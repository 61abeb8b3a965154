"""Plan a request: its three jobs, what a budget allows, and settings that save memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from modulora_core.arguments import checked
from modulora_core.errors import OptionError, RequestError
from modulora_core.models.ends import EMBEDDINGS, HEAD
from modulora_core.registry import Choice
from modulora_planner import memory
from modulora_planner.dense_weights import NONE
from modulora_planner.memory import Job
from modulora_planner.model import Dense, PlannedModel, open_planned
from modulora_planner.rehearsal import Rehearsal, rehearse_decoding, rehearse_training
from modulora_planner.remedies import Change, Remedies, installed_choices
from modulora_planner.request import SAMPLES, SEQ_LEN, PlanRequest, finetuning

MOST_BATCH, MOST_SEQ_LEN = 1024, 2**17
"""The largest batch of a search, and its longest sequence if the model has no limit."""

CLOSE = 0.02
"""A search ends when the largest size that fits and the smallest that does not differ by this
share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The memory that a model needs with one quantizer.

    Attributes:
        request: the question.
        quantizer: the quantizer's name; several are joined by a plus.
        options: the options of the first quantizer.
        bits_per_weight: the mean over all packed weights.
        packed_bytes: the bytes of codes and scales.
        training, decoding, quantizing: the three jobs; no quantizing for a packed checkpoint.
        fits: training fits the budget; None without a budget.
        longest_seq_len: the longest that fits with the same batch size; 0 if none does.
        largest_batch_size: the largest that fits with the same sequence length.
        changes: settings that save memory, the largest saving first; empty if training fits.
        together: the fewest of them that fit together; None if training fits or no few of them do.
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
    changes: tuple[Change, ...] = ()
    together: Change | None = None

    @property
    def jobs(self) -> dict[str, Job]:
        """The jobs by name."""
        jobs = {"training": self.training, "decoding": self.decoding}
        return jobs if self.quantizing is None else {**jobs, "quantizing": self.quantizing}

    @property
    def title(self) -> str:
        """The quantizer, and the options that were asked for or that a packed model has."""
        asked = self.request.quantizer
        if asked is not None and asked.quantizer == self.quantizer:
            return asked.label
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.quantizer} {options}".rstrip()

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.request.model, "quantizer": self.quantizer,
            "options": dict(self.options), "device": self.request.device,
            "processes": self.request.processes,
            "bits_per_weight": self.bits_per_weight, "packed_bytes": self.packed_bytes,
            "training_bytes": self.training.nbytes, "items": dict(self.training.items),
            "budget_bytes": self.request.budget, "fits": self.fits,
            "jobs": {name: job.to_json() for name, job in self.jobs.items()},
            "longest_seq_len": self.longest_seq_len,
            "largest_batch_size": self.largest_batch_size,
            "changes": [change.to_json() for change in self.changes],
            "together": None if self.together is None else self.together.to_json(),
        }  # fmt: skip


@checked
def plan(
    model: str | Path,
    quantizer: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    budget: int | None = None,
    head: Choice | None = None,
    embeddings: Choice | None = None,
    padded: bool = False,
    calibration_samples: int = SAMPLES,
    calibration_seq_len: int = SEQ_LEN,
    revision: str | None = None,
    processes: int = 1,
    **fields: Any,
) -> MemoryPlan:
    """Plan the memory of training, decoding and quantizing, from the model's config alone.

    ::

        print(plan("org/model", "NAME", {"bits": 3}, seq_len=1024).training.nbytes)

    Args:
        model: MODEL as on the command line.
        quantizer: its name, and its ``options``; None for a quantized model.
        budget: bytes; with a budget the plan says what fits, and which settings save memory.
        fields: fields of :class:`~modulora_core.training.config.FinetuneConfig`.

    The other arguments are attributes of :class:`~modulora_planner.request.PlanRequest`.

    Raises:
        OptionError: a quantizer for a packed model, none for a dense one, or a wrong option.
        RequestError: the model, the quantizer or a setting cannot be used.
    """
    choice = None if quantizer is None else Choice(quantizer, options or {})
    request = PlanRequest(
        model=os.fspath(model), quantizer=choice, head=head, embeddings=embeddings,
        config=finetuning(fields), device=device, budget=budget, padded=padded,
        calibration_samples=calibration_samples, calibration_seq_len=calibration_seq_len,
        revision=revision, processes=processes,
    )  # fmt: skip
    return plan_request(request)


def plan_request(request: PlanRequest) -> MemoryPlan:
    """Plan for one quantizer, or for a packed checkpoint. See :func:`plan`."""
    request, found = open_planned(request)
    if isinstance(found, PlannedModel):
        choices = {"quantizer": request.quantizer, f"--{HEAD}": request.head,
                   f"--{EMBEDDINGS}": request.embeddings}  # fmt: skip
        for subject, choice in choices.items():
            if choice is not None:
                raise OptionError(
                    f"{subject} {choice.label}: expected a model that isn't packed, and "
                    f"{request.model} is; leave it out"
                )
        return _fitted(request, found, None)
    if request.quantizer is None:
        raise OptionError(f"model {request.model}: it isn't packed: expected a quantizer, got none")
    return _fitted(request, found.as_asked(request), found)


def plan_all(request: PlanRequest) -> list[MemoryPlan]:
    """Plan for each installed quantizer, with each configuration of its promises.

    It leaves out quantizers that cannot pack the model. A packed checkpoint gets one plan.
    """
    request, found = open_planned(request)
    if isinstance(found, PlannedModel):
        return [plan_request(request)]
    plans: list[MemoryPlan] = []
    rehearsals = None
    for choice in installed_choices():
        asked = replace(request, quantizer=choice)
        try:
            packed = found.as_asked(asked)
        except RequestError:
            continue
        # every quantizer's operations are the same
        rehearsals = rehearsals or _rehearse(asked, packed)
        plans.append(_plan(asked, packed, found, rehearsals))
    return plans


def _rehearse(request: PlanRequest, packed: PlannedModel) -> tuple[Rehearsal, Rehearsal]:
    return rehearse_training(packed, request), rehearse_decoding(packed, request)


def _plan(
    request: PlanRequest,
    packed: PlannedModel,
    dense: Dense | None,
    rehearsals: tuple[Rehearsal, Rehearsal],
) -> MemoryPlan:
    """The three jobs; ``dense`` is the model before it is packed."""
    quantizers = packed.record.quantizers()
    training = memory.training(packed, request, rehearsals[0])
    is_quantized = dense is not None and request.quantizer != NONE
    return MemoryPlan(
        request=request,
        quantizer="+".join(dict.fromkeys(group["quantizer"] for group in quantizers)),
        options=quantizers[0]["options"],
        bits_per_weight=packed.record.bits_per_weight,
        packed_bytes=packed.record.nbytes,
        training=training,
        decoding=memory.decoding(packed, request, rehearsals[1]),
        quantizing=memory.quantizing(packed, request) if is_quantized else None,
        fits=None if request.budget is None else training.nbytes <= request.budget,
    )


def _fitted(request: PlanRequest, packed: PlannedModel, dense: Dense | None) -> MemoryPlan:
    """The plan, and what its budget allows."""
    rehearsals = _rehearse(request, packed)
    plan = _plan(request, packed, dense, rehearsals)
    if request.budget is None:
        return plan
    config, budget = request.config, request.budget
    known = {(config.seq_len, config.batch_size): plan.training.nbytes}

    def nbytes(seq_len: int, batch_size: int) -> int:
        if (seq_len, batch_size) not in known:
            changed = request.changed(seq_len=seq_len, batch_size=batch_size)
            rehearsal = rehearse_training(packed, changed)
            known[seq_len, batch_size] = memory.training(packed, changed, rehearsal).nbytes
        return known[seq_len, batch_size]

    lengths = range(2, (packed.dense.window or MOST_SEQ_LEN) + 1)
    longest = largest(lambda n: nbytes(n, config.batch_size), budget, config.seq_len, lengths)
    sizes = range(1, MOST_BATCH + 1)
    batch = largest(lambda n: nbytes(config.seq_len, n), budget, config.batch_size, sizes)
    plan = replace(plan, longest_seq_len=longest, largest_batch_size=batch)
    if plan.fits:
        return plan
    found = Remedies(request, packed, dense, rehearsals[0])
    return replace(plan, changes=found.changes, together=found.together())


def largest(nbytes: Callable[[int], int], budget: int, start: int, allowed: range) -> int:
    """Find, to within 2 %, the largest number whose bytes fit ``budget``; 0 if none does.

    Bytes grow almost linearly, so the next trial interpolates between the interval's ends. It
    bisects if the last trial did not halve the interval.
    """
    known = {start: nbytes(start)}
    n, width = min(2 * start, allowed[-1]) if known[start] <= budget else allowed[0], 0
    while True:
        known[n] = nbytes(n)
        low = max((m for m, found in known.items() if found <= budget), default=0)
        high = min((m for m, found in known.items() if found > budget), default=allowed[-1] + 1)
        if high == allowed[0]:
            return 0
        close = max(1, int(CLOSE * low))
        if low and high - low <= close:
            return low
        half, halved = (low + high) // 2, 2 * (high - low) <= width
        width = high - low
        n = half
        if halved and low in known and high in known:
            share = (budget - known[low]) / (known[high] - known[low])
            n = min(max(low + int(share * width), low + close), high - 1)
