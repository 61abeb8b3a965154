"""Quantizing: a parameter, or with calibration a decoder block, in memory at a time."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch

from modulora_core.calibration.states import SPILL_BYTES
from modulora_core.calibration.walk import PAUSED_BYTES
from modulora_core.checkpoints.record import PackedSite
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.quiet import quiet
from modulora_core.planner import overhead
from modulora_core.planner.jobs import Job, job
from modulora_core.planner.request import PlanRequest
from modulora_core.planner.subject import Subject
from modulora_core.planner.workspace import packing_workspace

FP32 = 4

MOMENTS = 4
"""H, its mean, and the two triangles that the mean is put together from (:mod:`modulora_core.calibration.moments`)."""


def quantizing(subject: Subject, request: PlanRequest) -> Job:
    """``modulora quantize`` on a CPU, one layer (without calibration) or one block (with it) at a time.

    With calibration this is an estimate: how much of a block waits between two layers depends on the model.
    """
    calibrated = any(quantizer.spec.calibration == "required" for quantizer in subject.quantizers)
    items = _by_block(subject, request) if calibrated else _by_layer(subject)
    process = overhead.CALIBRATING_BYTES if calibrated else overhead.QUANTIZING_BYTES
    return job(
        "a layer is packed", items | {"runtime": overhead.of_process(process, request.device)}
    )


def _stored_dtype(subject: Subject) -> torch.dtype:
    return subject.config.dtype or torch.float32


def _by_layer(subject: Subject) -> dict[str, float]:
    """The largest of all parameters: as it is stored, and what packing it takes. While one is read, the one before is still there."""
    width = _stored_dtype(subject).itemsize
    worst: dict[str, float] = {"dense_weights": _largest_pair(subject)}
    for site in subject.record.sites:
        found = {"dense_weights": site.weights * width, "workspace": _packing(subject, site)}
        worst = max(worst, found, key=lambda items: sum(items.values()))
    return worst


def _by_block(subject: Subject, request: PlanRequest) -> dict[str, float]:
    sizes = subject.config.get_text_config()
    tokens = request.calibration_samples * request.calibration_seq_len
    hidden = tokens * sizes.hidden_size * FP32
    widest = max(site.layout.shape[1] for site in _calibrated(subject))
    paused = min(PAUSED_BYTES, tokens * FP32 * (2 * sizes.hidden_size + widest))
    moment = widest**2 * FP32
    kept = 0 if hidden > SPILL_BYTES else hidden
    packing = {
        "dense_weights": _dense_block(subject) * FP32,
        "workspace": max(_packing(subject, site) for site in _calibrated(subject)),
        "activations": paused,
        "calibration": kept + MOMENTS * moment,
    }
    # the embedding is there until all samples have come through it
    entering = {
        "dense_weights": (_dense_block(subject) + _table(subject)) * FP32,
        "calibration": kept,
    }
    items = max(packing, entering, key=lambda items: sum(items.values()))
    of_heap = min(moment, overhead.HEAP_BLOCK)
    return items | {"allocator": overhead.unused("cpu", 0, of_heap, overhead.LAYERS)}


def _calibrated(subject: Subject) -> list[PackedSite]:
    """What is packed within the blocks."""
    return [site for name, site in subject.record.items() if subject.block_of(name)]


def _packing(subject: Subject, site: PackedSite) -> float:
    """Of one matrix, and of a stack's others what they were packed into."""
    one = packing_workspace(subject.quantizers[site.recipe], site.layout.shape)
    return one + ((site.experts or 1) - 1) * site.layout.nbytes


def _dense_block(subject: Subject) -> int:
    """Weights of the largest block."""
    sizes = Counter[str]()
    for name, site in subject.record.items():
        sizes[subject.block_of(name)] += site.weights
    del sizes[""]
    return max(sizes.values(), default=0)


def _table(subject: Subject) -> int:
    """Weights of the input embedding."""
    with quiet():
        model = build_skeleton(subject.config, _stored_dtype(subject))
    return sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())


def _largest_pair(subject: Subject) -> int:
    """Bytes of the two largest parameters that follow each other, packed or not."""
    with quiet():
        model = build_skeleton(subject.config, _stored_dtype(subject))
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in model.named_parameters()]
    return max(map(sum, pairwise(sizes)), default=sum(sizes))
