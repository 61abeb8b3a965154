"""Quantizes within a budget: measures every layer under every choice, chooses, and packs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modulora_core.calibration import CalibrationConfig, calibration_text, find_blocks
from modulora_core.calibration.states import spilled_by, spilled_bytes
from modulora_core.checkpoints.outputs import check_output
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES
from modulora_core.devices import pick_device
from modulora_core.devices.memory import PeakMemory
from modulora_core.errors import OptionError
from modulora_core.models import open_model
from modulora_core.models.progress import Progress
from modulora_core.quantization.layout import Selection
from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate
from modulora_core.quantization.mixed.candidates import Candidates, find_candidates
from modulora_core.quantization.mixed.errors import JOURNAL, held_out_ids, measure_errors
from modulora_core.quantization.mixed.recorded import recorded_allocation
from modulora_core.quantization.quantize import QuantizeResult, result_of, unfinished, write_packed
from modulora_core.registry import Choice

MIXED = "mixed"
"""The name that a result gives instead of one quantizer's."""


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
    """Quantize ``model`` into ``out``, with a quantizer for each layer that a budget chooses.

    The sum of the layers' errors is small within the budget. The tensors are the ones that
    :func:`~modulora_core.quantization.quantize.quantize` writes with these quantizers.

    Args:
        choices: the quantizers to choose from, at least two.
        budget: bytes of all tensors of the checkpoint, packed and dense. Headers, config and
            tokenizer do not count.
        calibration: the text that errors are measured on and quantizers are calibrated with.
        resume: continue the same request in ``out.partial`` after a killed run. Measured layers
            and packed parameters are kept.
        model, include, exclude, head, embeddings, device, seed, max_shard_bytes, revision,
            progress: as for ``quantize``.

    Returns:
        its ``allocation`` is :func:`~modulora_core.quantization.mixed.recorded.recorded_allocation`
        with the names of ``choices``. It also has the ``error`` and its lower ``bound``, in nats
        per token; for each layer ``error``, and ``errors`` under each choice; for each choice
        ``error`` of its layers, and ``uniform_bytes`` and ``uniform_error`` of a checkpoint with
        this choice everywhere.

    Raises:
        RequestError: the request can't be fulfilled, such as a budget that is too small; nothing
            was written.
        WorkError: an input, a gradient or an error is NaN or Inf, or a quantizer failed.
    """
    started = time.perf_counter()
    where, out = pick_device(device), Path(out)
    with PeakMemory(where) as peak:
        check_output(out, resume=resume)
        source = open_model(model, revision=revision)
        text = calibration_text(source, calibration, seed)
        selection = Selection(include, exclude, head, embeddings)
        candidates = find_candidates(source, choices, text, selection, seed=seed)
        _check_budget(candidates, budget)
        request = {
            "source": source.identity(),
            "seed": seed,
            "weights": [linear.name for linear in candidates.linears],
            "kept": dict(candidates.kept),
            **candidates.to_json(budget),
            "max_shard_bytes": max_shard_bytes,
        }
        states = (len(find_blocks(source.skeleton())) + 1) * held_out_ids(text).numel()
        spilled = spilled_bytes(states, source.config, where, text.config.spill)
        spilled += spilled_by(text, source.config, where)
        nbytes = min(budget, candidates.largest) + spilled
        with unfinished(source, out, request, nbytes, resume, progress) as (folder, resumes):
            errors = measure_errors(
                source, candidates, device=where, folder=folder, resume=resumes, progress=progress
            )
            allocation = _choose(candidates, errors, budget)
            taken = dict(zip(candidates.sizes, allocation.taken, strict=True))
            layout = candidates.layout(source, taken, budget, max_shard_bytes)
            packed = write_packed(source, layout, folder, where, resume=resumes, progress=progress)
            (folder / JOURNAL).unlink(missing_ok=True)
    table = _with_errors(candidates, layout.record, errors, allocation)
    seconds = time.perf_counter() - started
    return result_of(source, layout, packed, out, (MIXED, {}), seconds, peak, table)


def _check_budget(candidates: Candidates, budget: int) -> None:
    smallest = candidates.smallest
    if budget >= smallest:
        return
    ends = ", ".join(f"{end.site.module} by {end.choice.label}" for end in candidates.ends)
    of_ends = f"{ends} {_mib(candidates.ends_bytes)}, " if ends else ""
    raise OptionError(
        f"budget: expected at least {smallest} bytes ({_mib(smallest)}), got {budget} "
        f"({_mib(budget)}): dense tensors take {_mib(candidates.kept_bytes)}, {of_ends}and the "
        f"smallest choice for every layer {_mib(smallest - candidates.fixed_bytes)}; give more, "
        "or smaller choices"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"


def _choose(
    candidates: Candidates, errors: Mapping[str, Sequence[float]], budget: int
) -> Allocation:
    offers = [list(map(Offer, sizes, errors[name])) for name, sizes in candidates.sizes.items()]
    return allocate(offers, budget - candidates.fixed_bytes)


def _with_errors(
    candidates: Candidates,
    record: QuantizationRecord,
    errors: Mapping[str, Sequence[float]],
    allocation: Allocation,
) -> dict[str, Any]:
    """The recorded table, with the facts that only this run knows: errors, and the user's names."""
    table = recorded_allocation(record, candidates.kept_bytes)
    assert table is not None, "the record is from this run"
    layers = table["layers"]
    for name, layer in layers.items():
        layer |= {"error": errors[name][layer["choice"]], "errors": list(errors[name])}
    for index, (choice, row) in enumerate(zip(candidates.choices, table["choices"], strict=True)):
        own = [layer["error"] for layer in layers.values() if layer["choice"] == index]
        sizes = [sizes[index] for sizes in candidates.sizes.values()]
        row |= {
            "name": choice.label,
            "error": sum(own),
            "uniform_bytes": candidates.fixed_bytes + sum(sizes),
            "uniform_error": math.fsum(layer["errors"][index] for layer in layers.values()),
        }
    for end in candidates.ends:
        table["ends"][end.site.name]["name"] = end.choice.label
    return {**table, "error": allocation.error, "bound": allocation.bound}
