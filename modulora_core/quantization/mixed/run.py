"""Quantizing under a budget: measure every layer under every choice, choose, and quantize as chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modulora_core.calibration import CalibrationConfig, find_blocks, spill_bytes
from modulora_core.calibration.sensitivity import FILE, boundary_bytes
from modulora_core.checkpoints.outputs import (
    SMALL_FILES,
    check_disk_space,
    check_output,
    whole_or_nothing,
)
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES
from modulora_core.devices import pick_device
from modulora_core.devices.memory import PeakMemory
from modulora_core.errors import OptionError
from modulora_core.models import ModelSource, open_model
from modulora_core.models.progress import Progress
from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate
from modulora_core.quantization.mixed.candidates import Candidates, find_candidates
from modulora_core.quantization.mixed.errors import JOURNAL, judging, measure_errors
from modulora_core.quantization.mixed.recorded import recorded_allocation
from modulora_core.quantization.quantize import (
    QuantizeResult,
    calibration_text,
    check_values,
    request_before,
    result_of,
    write_packed,
    write_request,
)
from modulora_core.registry import Choice

MIXED = "mixed"
"""What a result says in the place of one quantizer's name."""


def quantize_mixed(
    model: str,
    out: str | Path,
    choices: Sequence[Choice],
    budget: int,
    *,
    calibration: CalibrationConfig,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: Choice | None = None,
    embeddings: Choice | None = None,
    device: str = "cpu",
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize ``model`` into ``out``, each layer with the choice that lets all of it fit and the loss grow least.

    The checkpoint is the one that :func:`~modulora_core.quantization.quantize.quantize` would write with the chosen quantizer for every layer.

    Args:
        choices: two or more.
        budget: bytes of all tensors of the checkpoint: packed ones, and what stays dense (norms; the embedding and the output head,
            if ``head`` and ``embeddings`` don't pack them). Headers, config and tokenizer don't count.
        calibration: the text that errors are measured on, and that quantizers are calibrated with.
        resume: go on with ``out.partial`` of a killed run of the same request: layers that were measured, and parameters that were
            packed, are kept.
        model, include, exclude, head, embeddings, device, seed, max_shard_bytes, revision, progress: as for ``quantize``.

    Returns:
        its ``allocation`` is what :func:`~modulora_core.quantization.mixed.recorded.recorded_allocation` reads from the checkpoint, with choices
        named as they were asked for, and ``error`` and ``bound`` of all layers, in nats per token; in each of ``layers`` ``error`` and
        ``errors`` (under each choice); in each of ``choices`` ``error`` of its layers, and ``uniform_bytes`` and ``uniform_error`` of a
        checkpoint that has it everywhere (the ends as they are here).

    Raises:
        RequestError: anything that can be known beforehand, before any work; also a budget that can't be met.
        WorkError: what can't.
    """
    started = time.perf_counter()
    where = pick_device(device)
    with PeakMemory(where) as peak:
        out = Path(out)
        check_output(out, resume=resume)
        source = open_model(model, revision=revision)
        text = calibration_text(source, calibration, seed)
        candidates = find_candidates(
            source, choices, text, include=include, exclude=exclude, head=head, embeddings=embeddings, seed=seed,
        )  # fmt: skip
        _check_budget(candidates, budget)
        request = {**_request(source, candidates, budget), "max_shard_bytes": max_shard_bytes}
        before = request_before(out, request, resume=resume)
        spilled = spill_bytes(text, source.config, where)
        blocks = len(find_blocks(source.skeleton()))
        spilled += boundary_bytes(judging(text), source.config, where, blocks, text.config.spill)
        check_disk_space(out, min(budget, candidates.largest) + SMALL_FILES + spilled)
        contents = check_values(source, out, before, progress)
        with whole_or_nothing(out, resume=bool(before)) as folder:
            write_request(folder, request, contents)
            errors = measure_errors(
                source, candidates, device=where, folder=folder, resume=bool(before), progress=progress
            )  # fmt: skip
            allocation = _choose(candidates, errors, budget)
            taken = dict(
                zip((linear.name for linear in candidates.linears), allocation.taken, strict=True)
            )
            plan = candidates.plan(source, taken, budget, max_shard_bytes)
            packed = write_packed(
                source, plan, folder, where, resume=bool(before), progress=progress
            )
            for leftover in (JOURNAL, FILE):
                (folder / leftover).unlink(missing_ok=True)
    return result_of(
        source, plan, packed, out=out, quantizer=MIXED, options={}, seconds=time.perf_counter() - started, peak=peak,
        allocation=_told(candidates, plan.record, errors, allocation),
    )  # fmt: skip


def _check_budget(candidates: Candidates, budget: int) -> None:
    smallest = candidates.smallest
    if budget >= smallest:
        return
    ends = ", ".join(f"{end.site.module} by {end.choice.label}" for end in candidates.ends)
    raise OptionError(
        f"budget: expected at least {smallest} bytes ({_mib(smallest)}), got {budget} ({_mib(budget)}): what stays dense takes "
        f"{_mib(candidates.kept_bytes)}, {f'{ends} {_mib(candidates.ends_bytes)}, ' if ends else ''}"
        f"and the smallest choice for every layer {_mib(smallest - candidates.fixed_bytes)}; give more, or smaller choices"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"


def _request(source: ModelSource, candidates: Candidates, budget: int) -> dict[str, Any]:
    """What makes two runs the same."""
    return {
        "source": source.identity(),
        "seed": candidates.seed,
        "weights": [linear.name for linear in candidates.linears],
        "kept": dict(candidates.kept),
        **candidates.to_json(budget),
    }


def _choose(
    candidates: Candidates, errors: Mapping[str, Sequence[float]], budget: int
) -> Allocation:
    offers = [
        [
            Offer(candidates.nbytes(linear, choice), error)
            for choice, error in enumerate(errors[linear.name])
        ]
        for linear in candidates.linears
    ]
    return allocate(offers, budget - candidates.fixed_bytes)


def _told(
    candidates: Candidates,
    record: QuantizationRecord,
    errors: Mapping[str, Sequence[float]],
    allocation: Allocation,
) -> dict[str, Any]:
    """What the record has, and what only this run knows: errors, and how the choices were typed."""
    told = recorded_allocation(record, candidates.kept_bytes)
    assert told is not None, "the record is of this run"
    for name, layer in told["layers"].items():
        layer |= {"error": errors[name][layer["choice"]], "errors": list(errors[name])}
    for index, (choice, row) in enumerate(zip(candidates.choices, told["choices"], strict=True)):
        row |= {
            "name": choice.label,
            "error": sum(layer["error"] for layer in told["layers"].values() if layer["choice"] == index),
            "uniform_bytes": candidates.fixed_bytes + sum(candidates.nbytes(linear, index) for linear in candidates.linears),
            "uniform_error": math.fsum(layer["errors"][index] for layer in told["layers"].values()),
        }  # fmt: skip
    for end in candidates.ends:
        told["ends"][end.site.name]["name"] = end.choice.label
    return {**told, "error": allocation.error, "bound": allocation.bound}
