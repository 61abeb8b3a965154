"""The items of the three jobs: what each needs at the moment when it needs most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modulora_core.planner import overhead
from modulora_core.planner.ledger import Bytes
from modulora_core.planner.rehearsal import Rehearsal, rehearse_decoding
from modulora_core.planner.request import PlanRequest
from modulora_core.planner.resident import loaded
from modulora_core.planner.subject import Subject

FP32 = 4
"""Bytes of a value of the adapter, of its gradient, and of each of AdamW's two moments."""

_SHOWN = 2**10
"""Bytes from which on an item is one."""

STATES_OF_A_SCALE = 256
"""Values that share a scale in bitsandbytes' states of one byte (Dettmers et al. 2021, arXiv 2110.02861)."""

ITEMS: Mapping[str, str] = {
    "packed_codes": "packed weights: codes",
    "packed_scales": "packed weights: scales and vectors",
    "embeddings_and_head": "embeddings and head",
    "norms_and_biases": "norms, biases and other dense weights",
    "adapter": "LoRA weights",
    "gradients": "gradients",
    "optimizer": "optimizer's states",
    "activations": "activations",
    "workspace": "tiles and copies in products",
    "loss": "logits and loss",
    "kv_cache": "cache of keys and values",
    "dense_weights": "dense weights in work",
    "calibration": "hidden states and second moments",
    "allocator": "held by the allocator, unused",
    "runtime": "interpreter, libraries, runtime",
}
"""Every item, in the order of tables and pictures, and how people call it."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job at its peak.

    Attributes:
        when: what it does then.
        items: bytes by the names of :data:`ITEMS`, those that are zero left out.
    """

    when: str
    items: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.items.values())

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.nbytes, "when": self.when, "items": dict(self.items)}


def job(when: str, items: Mapping[str, float]) -> Job:
    """With the items in their order."""
    return Job(when, {name: round(items[name]) for name in ITEMS if items.get(name, 0) >= _SHOWN})


def training(subject: Subject, request: PlanRequest, rehearsal: Rehearsal) -> Job:
    """The step of ``request.config`` that takes most: one after the first, when the optimizer has its states, unless there is one only.

    Args:
        rehearsal: of its forward and backward.
    """
    config = request.config
    states = _states(rehearsal, request)
    first_alone = config.steps == 1 and not config.apply_gradients_at_once
    at, most = rehearsal.timeline.peak()
    moving = Bytes(most) + Bytes(optimizer=0 if first_alone else states)
    step = _step_of_optimizer(rehearsal, request) + Bytes(optimizer=states)
    if step.total() > moving.total():
        at, moving = "optimizer", step
    if config.grad_accum > 1:  # those of the micro-batch before are there all the time
        moving["gradients"] = FP32 * rehearsal.adapter
    unused = overhead.unused(request.device, moving.total(), rehearsal.largest, overhead.STEPS)
    held = {**loaded(subject, request, _tokens(request)), "adapter": FP32 * rehearsal.adapter}
    extra = {
        "allocator": unused,
        "runtime": overhead.of_process(overhead.TRAINING_BYTES, request.device),
    }
    return job(_when(at), {**held, **moving, **extra})


def _tokens(request: PlanRequest) -> int | None:
    """Tokens that the run reads; None where it has no end."""
    config = request.config
    return (
        None
        if config.steps is None
        else config.steps * config.grad_accum * config.batch_size * config.seq_len
    )


def decoding(subject: Subject, request: PlanRequest) -> Job:
    """One answer within a context of ``seq_len`` tokens, most of it the prompt.

    Raises:
        ModelError: the model can't be run without its weights.
    """
    rehearsal = rehearse_decoding(subject, request)
    _, most = rehearsal.timeline.peak()
    moving = Bytes(most)
    moving["activations"] -= min(rehearsal.kept, moving["activations"])
    extra = {"kv_cache": rehearsal.kept, "allocator": overhead.unused(request.device, most.total(), rehearsal.largest, overhead.FORWARDS),
             "runtime": overhead.of_process(overhead.RUNNING_BYTES, request.device)}  # fmt: skip
    weights = loaded(subject, request, request.config.seq_len)
    return job("the prompt is read", {**weights, **moving, **extra})


def _states(rehearsal: Rehearsal, request: PlanRequest) -> int:
    values = rehearsal.largest_adapter if request.config.offload_optimizer else rehearsal.adapter
    if request.config.optimizer == "adamw-8bit":
        return round(2 * values * (1 + FP32 / STATES_OF_A_SCALE))
    return 2 * values * FP32


def _step_of_optimizer(rehearsal: Rehearsal, request: PlanRequest) -> Bytes:
    """All gradients, and torch's copies: of one parameter after the other on a CPU, of all at once on a GPU."""
    copied = rehearsal.largest_adapter if request.device == "cpu" else rehearsal.adapter
    gradients = 0 if request.config.apply_gradients_at_once else FP32 * rehearsal.adapter
    return Bytes({"gradients": gradients, "workspace": 2 * FP32 * copied})


def _when(segment: str) -> str:
    kind = segment.partition(" ")[0]
    return {"forward": "the forward ends", "loss": "the loss is computed", "backward": "a block's backward runs",
            "optimizer": "the optimizer steps"}.get(kind, "a step begins")  # fmt: skip
