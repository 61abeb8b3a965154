"""Find settings that save memory where a run does not fit, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import combinations
from typing import Any

from modulora_core import registry
from modulora_core.errors import RequestError
from modulora_core.models.ends import EMBEDDINGS, HEAD
from modulora_core.registry import Choice
from modulora_planner import memory
from modulora_planner.model import Dense, PlannedModel
from modulora_planner.rehearsal import Rehearsal, rehearse_training
from modulora_planner.request import PlanRequest

WORTH = 2**20
"""Bytes that a change must save to be listed."""

SAME_STEP = frozenset({"optim", "mapped", "shard"})
"""Settings that change nothing in a forward and a backward."""

MOST_TOGETHER, MOST_TRIALS = 4, 12
"""The most settings to combine, and the most plans for each number of combined settings."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that saves memory.

    Attributes:
        change: the setting as options of the command line.
        nbytes: bytes of training with it.
        saves: bytes less than without it.
        fits: training fits the budget with it.
        request: the plan's request with it.
    """

    change: str
    nbytes: int
    saves: int
    fits: bool
    request: PlanRequest

    def to_json(self) -> dict[str, Any]:
        return {
            "change": self.change, "training_bytes": self.nbytes, "saves": self.saves,
            "fits": self.fits,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Setting:
    """A setting on trial.

    Attributes:
        words: the change, as options of the command line.
        kind: two settings of one kind exclude each other.
        lossy: it changes the result of training by more than rounding.
        apply: gives a request with it; raises OptionError if another setting excludes it.
        fields: its fields of FinetuneConfig; empty for quantizers.
    """

    words: str
    kind: str
    lossy: bool
    apply: Callable[[PlanRequest], PlanRequest]
    fields: frozenset[str] = frozenset()


class Remedies:
    """The settings that save memory in a run beyond its budget.

    Args:
        request: the run, with a budget.
        packed, dense: its model; dense is None for a packed checkpoint.
        rehearsal: the rehearsal of its training.

    Attributes:
        changes: the changes, each alone, the largest saving first.
    """

    def __init__(
        self, request: PlanRequest, packed: PlannedModel, dense: Dense | None, rehearsal: Rehearsal
    ) -> None:
        self._request, self._packed, self._dense = request, packed, dense
        self._rehearsal, self._budget = rehearsal, request.budget or 0
        self._before = memory.training(packed, request, rehearsal).nbytes
        found: list[tuple[_Setting, Change]] = []
        settings = [*_settings(request, packed), *(_quantizers(request) if dense else ())]
        for setting in settings:
            change = self._tried([setting])
            if change is not None and change.saves > WORTH:
                found.append((setting, change))
        self._found = sorted(found, key=lambda pair: -pair[1].saves)
        self.changes = tuple(change for _, change in self._found)

    def together(self) -> Change | None:
        """The fewest settings that fit together; among equals, those that change results least."""
        saves = {setting.words: change.saves for setting, change in self._found}

        def cost(group: tuple[_Setting, ...]) -> tuple[int, int]:
            return sum(s.lossy for s in group), -sum(saves[s.words] for s in group)

        settings = [setting for setting, _ in self._found]
        for size in range(1, MOST_TOGETHER + 1):
            groups = [
                group
                for group in combinations(settings, size)
                if len({setting.kind for setting in group}) == size
                # savings overlap, so together they save at most their sum
                and self._before - sum(saves[s.words] for s in group) <= self._budget
            ]
            for group in sorted(groups, key=cost)[:MOST_TRIALS]:
                change = self._tried(group)
                if change is not None and change.fits:
                    return change
        return None

    def _tried(self, group: Sequence[_Setting]) -> Change | None:
        """The plan with these settings; None where they exclude each other."""
        try:
            asked = reduce(lambda request, setting: setting.apply(request), group, self._request)
            quantizers = (asked.quantizer, asked.head, asked.embeddings)
            before = (self._request.quantizer, self._request.head, self._request.embeddings)
            packed = self._packed
            if quantizers != before and self._dense is not None:
                packed = self._dense.as_asked(asked)
        except RequestError:
            return None
        # beside weights, steps with other quantizers take about the same memory
        same = all(SAME_STEP.issuperset(setting.fields) for setting in group)
        rehearsal = self._rehearsal if same else rehearse_training(packed, asked)
        nbytes = memory.training(packed, asked, rehearsal).nbytes
        words = " ".join(setting.words for setting in group)
        return Change(words, nbytes, self._before - nbytes, nbytes <= self._budget, asked)


def installed_choices() -> Iterator[Choice]:
    """Each usable quantizer with each configuration of its promises."""
    for entry in registry.entries():
        if entry.status == "ok" and entry.spec is not None:
            for options in [promise.options for promise in entry.spec.promises] or [{}]:
                yield Choice(entry.name, options)


def _settings(request: PlanRequest, packed: PlannedModel) -> Iterator[_Setting]:
    """Settings of the run that may save memory."""
    config, on_gpu = request.config, request.device == "cuda"
    passes, half = config.grad_accum * config.batch_size, config.seq_len // 2
    optim = "adamw_bnb_8bit" if on_gpu else "adafactor"
    settings: list[tuple[bool, bool, str, dict[str, Any]]] = [
        (not (on_gpu or config.mapped or packed.foreign), False, "--mapped", {"mapped": True}),
        (request.processes > 1 and not config.shard, False, "--shard", {"shard": True}),
        (not config.gradient_checkpointing, False, "--gradient-checkpointing",
         {"gradient_checkpointing": True}),
        (config.keep_products, False, "--no-keep-products", {"keep_products": False}),
        (on_gpu and not config.offload_activations, False, "--offload-activations",
         {"offload_activations": True}),
        (config.batch_size > 1, False, f"--batch-size 1 --grad-accum {passes}",
         {"batch_size": 1, "grad_accum": passes}),
        (half > 128, True, f"--seq-len {half}", {"seq_len": half}),
        (request.dtype == "float32", True, "--dtype bfloat16", {"dtype": "bfloat16"}),
        (config.optim != optim, False, f"--optim {optim}", {"optim": optim}),
        (config.rank > 8, True, "--rank 8", {"rank": 8}),
    ]  # fmt: skip
    for helps, lossy, words, fields in settings:
        if helps:
            change = partial(_changed, fields)
            yield _Setting(words, words.split()[0], lossy, change, frozenset(fields))


def _changed(fields: dict[str, Any], request: PlanRequest) -> PlanRequest:
    return request.changed(**fields)


def _quantizers(request: PlanRequest) -> Iterator[_Setting]:
    """Other quantizers, and dense ends packed with the most precise one without calibration."""
    for choice in installed_choices():
        options = [f"-o {name}={value}" for name, value in choice.options.items()]
        words = " ".join([f"-q {choice.quantizer}", *options])
        yield _Setting(words, "-q", True, partial(_with, quantizer=choice))
    specs = [e.spec for e in registry.entries() if e.status == "ok" and e.spec is not None]
    offered = [(max(s.bits), s.name) for s in specs if s.calibration == "none" and max(s.bits) < 16]
    if not offered:
        return
    choice = Choice(max(offered)[1])
    head, embeddings = f"--{HEAD} {choice.label}", f"--{EMBEDDINGS} {choice.label}"
    if request.head is request.embeddings is None:
        both = partial(_with, head=choice, embeddings=choice)
        yield _Setting(f"{head} {embeddings}", "ends", False, both)
    if request.head is None:
        yield _Setting(head, "ends", False, partial(_with, head=choice))
    if request.embeddings is None:
        yield _Setting(embeddings, "ends", False, partial(_with, embeddings=choice))


def _with(request: PlanRequest, **choices: Choice) -> PlanRequest:
    return replace(request, **choices)  # type: ignore[arg-type]  # fields of these names
