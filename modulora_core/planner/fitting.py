"""Plan a request: its three jobs, what a budget allows, and settings that save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from modulora_core import registry
from modulora_core.arguments import checked
from modulora_core.errors import OptionError, RequestError
from modulora_core.models.ends import EMBEDDINGS, HEAD
from modulora_core.planner import memory
from modulora_core.planner.memory import Job
from modulora_core.planner.model import Dense, Packed, open_planned
from modulora_core.planner.rehearsal import Rehearsal, rehearse_decoding, rehearse_training
from modulora_core.planner.request import PlanRequest, finetuning
from modulora_core.planner.unpacked import NONE
from modulora_core.registry import Choice

MOST_BATCH, MOST_SEQ_LEN = 1024, 2**17
"""The largest batch, and without a limit of the model the longest sequence, of a search."""

CLOSE = 0.02
"""A search ends when what fits and what does not differ by this share."""

WORTH = 2**20
"""Bytes that a change must save to be listed."""

SAME_STEP = frozenset({"optim", "mapped", "shard"})
"""Settings that change nothing in a forward and a backward."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that saves memory.

    Attributes:
        change: the setting as options of the command line.
        nbytes: bytes of training with it.
        saves: bytes less than without it.
        fits: training fits the budget with it.
    """

    change: str
    nbytes: int
    saves: int
    fits: bool


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory that a model needs with one quantizer.

    Attributes:
        request: the question.
        quantizer: its name; several are joined by a plus. ``options`` are of the first.
        bits_per_weight: over all packed weights.
        packed_bytes: codes and scales.
        quantizing: None for a packed checkpoint.
        fits: training fits the budget; None without a budget.
        longest_seq_len: that fits, with the same batch size; 0 if none does.
        largest_batch_size: that fits, with the same sequence length.
        changes: settings that save memory, the largest saving first; empty if training fits.
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

    @property
    def jobs(self) -> dict[str, Job]:
        """The jobs by name."""
        jobs = {"training": self.training, "decoding": self.decoding}
        return jobs if self.quantizing is None else {**jobs, "quantizing": self.quantizing}

    @property
    def title(self) -> str:
        """The quantizer and its options, in one line."""
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
            "changes": [
                {"change": c.change, "training_bytes": c.nbytes, "saves": c.saves, "fits": c.fits}
                for c in self.changes
            ],
        }  # fmt: skip


@checked
def plan(
    model: str,
    quantizer: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    budget: int | None = None,
    head: Choice | None = None,
    embeddings: Choice | None = None,
    padded: bool = False,
    calibration_samples: int = 128,
    calibration_seq_len: int = 512,
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

    The other arguments are attributes of :class:`~modulora_core.planner.request.PlanRequest`.

    Raises:
        OptionError: a quantizer for a packed model, none for a dense one, or a wrong option.
        RequestError: the model, the quantizer or a setting cannot be used.
    """
    choice = None if quantizer is None else Choice(quantizer, options or {})
    request = PlanRequest(
        model, choice, head, embeddings, finetuning(fields), device, budget, padded,
        calibration_samples, calibration_seq_len, revision, processes,
    )  # fmt: skip
    return plan_request(request)


def plan_request(request: PlanRequest) -> MemoryPlan:
    """Plan for one quantizer, or for a packed checkpoint. See :func:`plan`."""
    request, found = open_planned(request)
    if isinstance(found, Packed):
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
    packed = _as_asked(found, request)
    return _fitted(request, packed, found)


def plan_all(request: PlanRequest) -> list[MemoryPlan]:
    """Plan for each installed quantizer, with each configuration of its promises.

    It leaves out quantizers that cannot pack the model. A packed checkpoint gets one plan.
    """
    request, found = open_planned(request)
    if isinstance(found, Packed):
        return [plan_request(request)]
    plans: list[MemoryPlan] = []
    rehearsals = None
    for choice in _choices():
        asked = replace(request, quantizer=choice)
        if (packed := _packed_by(found, asked)) is not None:
            # every quantizer's operations are the same
            rehearsals = rehearsals or _rehearse(asked, packed)
            plans.append(_plan(asked, packed, found, rehearsals))
    return plans


def _choices() -> Iterator[Choice]:
    """Each usable quantizer with each configuration of its promises."""
    for entry in registry.entries():
        if entry.status == "ok" and entry.spec is not None:
            for options in [promise.options for promise in entry.spec.promises] or [{}]:
                yield Choice(entry.name, options)


def _packed_by(dense: Dense, request: PlanRequest) -> Packed | None:
    """The model as the request packs it; None where that is impossible."""
    try:
        return _as_asked(dense, request)
    except RequestError:
        return None


def _as_asked(dense: Dense, request: PlanRequest) -> Packed:
    assert request.quantizer is not None
    dtype = getattr(torch, request.dtype)
    return dense.packed_by(request.quantizer, request.head, request.embeddings, dtype=dtype)


def _rehearse(request: PlanRequest, packed: Packed) -> tuple[Rehearsal, Rehearsal]:
    return rehearse_training(packed, request), rehearse_decoding(packed, request)


def _plan(
    request: PlanRequest,
    packed: Packed,
    dense: Dense | None,
    rehearsals: tuple[Rehearsal, Rehearsal],
) -> MemoryPlan:
    """The three jobs; ``dense`` is the model before it is packed."""
    quantizers = packed.record.quantizers()
    training = memory.training(packed, request, rehearsals[0])
    return MemoryPlan(
        request,
        "+".join(dict.fromkeys(group["quantizer"] for group in quantizers)),
        quantizers[0]["options"],
        packed.record.bits_per_weight,
        packed.record.nbytes,
        training,
        memory.decoding(packed, request, rehearsals[1]),
        None if dense is None or request.quantizer == NONE else memory.quantizing(packed, request),
        None if request.budget is None else training.nbytes <= request.budget,
    )


def _fitted(request: PlanRequest, packed: Packed, dense: Dense | None) -> MemoryPlan:
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
    return (
        plan if plan.fits else replace(plan, changes=_changes(plan, packed, dense, rehearsals[0]))
    )


def largest(nbytes: Callable[[int], int], budget: int, start: int, allowed: range) -> int:
    """Find the largest number whose bytes are within ``budget``, to within 2 %; 0 if none is.

    Bytes grow nearly in a line. So the next trial is where the line through the two nearest known
    numbers meets the budget.
    """
    known = {start: nbytes(start)}
    n = min(2 * start, allowed[-1]) if known[start] <= budget else allowed[0]
    while True:
        known[n] = nbytes(n)
        low = max((m for m, found in known.items() if found <= budget), default=0)
        high = min((m for m, found in known.items() if found > budget), default=allowed[-1] + 1)
        if high == allowed[0]:
            return 0
        if low and high - low <= max(1, int(CLOSE * low)):
            return low
        (a, at_a), (b, at_b) = sorted(known.items(), key=lambda point: abs(point[1] - budget))[:2]
        half = (low + high) // 2
        n = half if at_a == at_b else a + int((budget - at_a) * (b - a) / (at_b - at_a))
        n = min(max(n, low + max(1, int(CLOSE * low))), high - 1)
        n = half if n in known else n


def _changes(
    plan: MemoryPlan, packed: Packed, dense: Dense | None, rehearsal: Rehearsal
) -> tuple[Change, ...]:
    """Settings that save memory, each alone, the largest saving first."""
    request, before, budget = plan.request, plan.training.nbytes, plan.request.budget or 0
    found: dict[str, int] = {}
    for words, fields in _other_settings(request, packed).items():
        try:
            changed = request.changed(**fields)
        except OptionError:  # it excludes another setting
            continue
        same = SAME_STEP.issuperset(fields)
        other_rehearsal = rehearsal if same else rehearse_training(packed, changed)
        found[words] = memory.training(packed, changed, other_rehearsal).nbytes
    # beside weights, steps with other quantizers take about the same memory
    rest = before - sum(memory.loaded(packed, request).values())
    for words, changed in {} if dense is None else _other_quantizers(request).items():
        if dense is not None and (other := _packed_by(dense, changed)) is not None:
            found[words] = rest + sum(memory.loaded(other, changed).values())
    changes = [Change(words, n, before - n, n <= budget) for words, n in found.items()]
    worth = [change for change in changes if change.saves > WORTH]
    return tuple(sorted(worth, key=lambda change: -change.saves))


def _other_settings(request: PlanRequest, packed: Packed) -> dict[str, dict[str, Any]]:
    """Settings of the run that may save memory: options, and fields of FinetuneConfig."""
    config, on_gpu = request.config, request.device == "cuda"
    passes, half = config.grad_accum * config.batch_size, config.seq_len // 2
    optim = "adamw_bnb_8bit" if on_gpu else "adafactor"
    settings: list[tuple[bool, str, dict[str, Any]]] = [
        (not (on_gpu or config.mapped or packed.foreign), "--mapped", {"mapped": True}),
        (request.processes > 1 and not config.shard, "--shard", {"shard": True}),
        (not config.gradient_checkpointing, "--gradient-checkpointing",
         {"gradient_checkpointing": True}),
        (config.keep_products, "--no-keep-products", {"keep_products": False}),
        (on_gpu and not config.offload_activations, "--offload-activations",
         {"offload_activations": True}),
        (config.batch_size > 1, f"--batch-size 1 --grad-accum {passes}",
         {"batch_size": 1, "grad_accum": passes}),
        (half > 128, f"--seq-len {half}", {"seq_len": half}),
        (request.dtype == "float32", "--dtype bfloat16", {"dtype": "bfloat16"}),
        (config.optim != optim, f"--optim {optim}", {"optim": optim}),
        (config.rank > 8, "--rank 8", {"rank": 8}),
    ]  # fmt: skip
    return {words: fields for helps, words, fields in settings if helps}


def _other_quantizers(request: PlanRequest) -> dict[str, PlanRequest]:
    """Other quantizers, and dense ends packed with the most precise one without calibration."""
    requests = {}
    for choice in _choices():
        options = [f"-o {name}={value}" for name, value in choice.options.items()]
        words = " ".join([f"-q {choice.quantizer}", *options])
        requests[words] = replace(request, quantizer=choice)
    specs = [e.spec for e in registry.entries() if e.status == "ok" and e.spec is not None]
    offered = [(max(s.bits), s.name) for s in specs if s.calibration == "none" and max(s.bits) < 16]
    if offered:
        choice = Choice(max(offered)[1])
        head, embeddings = f"--{HEAD} {choice.label}", f"--{EMBEDDINGS} {choice.label}"
        if request.head is None:
            requests[head] = replace(request, head=choice)
        if request.embeddings is None:
            requests[embeddings] = replace(request, embeddings=choice)
        if request.head is request.embeddings is None:
            both = replace(request, head=choice, embeddings=choice)
            requests[f"{head} {embeddings}"] = both
    return requests
