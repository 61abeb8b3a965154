"""Quantizes a model into a packed checkpoint, a parameter or a decoder block at a time.

The layout of the checkpoint comes first: it refuses wrong requests and has every byte's place.
:func:`quantize` then streams: it reads a parameter, packs it, writes it to its place, and drops
it.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modulora_core.arguments import checked
from modulora_core.calibration import (
    CalibrationConfig,
    CalibrationText,
    block_prefixes,
    calibration_text,
)
from modulora_core.calibration.output_moments import moment_bytes
from modulora_core.calibration.states import spilled_bytes
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.checkpoints.written.model_card import FILE as CARD
from modulora_core.checkpoints.written.model_card import model_card
from modulora_core.checkpoints.written.outputs import (
    check_output,
    write_digests,
    write_file,
)
from modulora_core.checkpoints.written.shards import MAX_SHARD_BYTES, ShardWriter, plan_shards
from modulora_core.distributed import is_first, pick_device, together, world_size
from modulora_core.errors import OptionError, OutputError, usable_path
from modulora_core.models import ModelSource, open_dense
from modulora_core.models.folders import REQUEST
from modulora_core.models.tokenizer import TOKENIZER_FILES
from modulora_core.progress import Display, Progress, shown
from modulora_core.quantization.layout import (
    Layout,
    Override,
    Selection,
    choose_layout,
    uses_output_moment,
)
from modulora_core.quantization.mixed.errors import ERRORS_FILE
from modulora_core.quantization.mixed.mixture import Budget, Mixture, find_mixture
from modulora_core.quantization.packer import WEIGHTING, PackingOutcome, pack_all
from modulora_core.quantization.quality import Quality, calibration_of, choice_of
from modulora_core.quantization.result import QuantizeResult, result_of
from modulora_core.quantization.resuming import check_contents, finished, unfinished
from modulora_core.registry import Choice

__all__ = ["Budget", "Choice", "Override", "QuantizeResult", "quantize"]

logger = logging.getLogger(__name__)


@checked
def quantize(
    model: str | Path,
    out: str | Path,
    quantizer: str | Budget,
    options: Mapping[str, Any] | None = None,
    *,
    quality: Quality = "balanced",
    overrides: Sequence[Override] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: Choice | None = None,
    embeddings: Choice | None = None,
    calibration: CalibrationConfig | None = None,
    device: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: bool = False,
    revision: str | None = None,
    progress: Display = True,
) -> QuantizeResult:
    """Quantize the linear layers of ``model`` into the folder ``out``.

    In a distributed run all processes call it. They divide the samples of a calibration and the
    packing after it, and the first one writes.

    The model is never whole in memory. ``out`` becomes a Hugging Face folder that
    :func:`modulora_core.load_model` opens. The same arguments give the same bytes::

        text = CalibrationConfig("text.txt")
        quantize("org/model", "packed", "NAME", {"group_size": 64}, calibration=text)
        choices = [Choice("NAME"), Choice("OTHER")]
        quantize("org/model", "mixed", Budget(3 * 2**30, choices), calibration=text)

    Args:
        model: a Hub id, a folder of safetensors, a file, or ``package:NAME``.
        out: a new or empty folder. It appears when it is whole.
        quantizer: a name of ``modulora list-quantizers``, or a :class:`Budget`, which chooses a
            quantizer for each layer.
        options: the quantizer's options, the fields of its ``Options``.
        quality: ``"fast"`` and ``"best"`` change defaults of calibration and quantizers
            (:mod:`modulora_core.quantization.quality`).
        overrides: other quantizers for some modules; the last match counts.
        include: quantize only modules whose dotted path matches one of these patterns (fnmatch).
        exclude: leave modules dense that match one of these patterns.
        head: also quantize the output head; embeddings: also the input embedding. In a tied model
            they are one table, and either packs both.
        calibration: the text for quantizers that need the second moment of each layer's inputs.
            Its ``tuning`` also trains each block after it was quantized.
        device: the torch device that packs, such as ``"cuda"``; None takes a GPU if there is one.
        seed: for random numbers of quantizers and the choice of samples.
        max_shard_bytes: the size of a file of the checkpoint.
        resume: continue the same request in ``out.partial`` after a killed run. Parameters that
            were written (with tuning: whole blocks) are kept. Without ``resume`` such a folder is
            refused. An ``out`` that the same request finished is left as it is, after the values
            of the weights were compared.
        revision: a branch, tag or commit of a Hub repository.
        progress: called with a phase, bytes done and all bytes of the phase; by default a bar on a
            terminal, and False shows none.

    Raises:
        RequestError: the request can't be fulfilled; nothing was written.
        WorkError: a layer's inputs are NaN or Inf, or a quantizer failed.
    """
    started, model = time.perf_counter(), os.fspath(model)
    where, out = pick_device(device), usable_path(out, "output folder", OutputError)
    with PeakMemory(where) as peak, shown(progress, "reading", "bytes") as progress:
        with together():
            done = finished(out) if resume else None
            if done is None:
                check_output(out, resume=resume)
            source = open_dense(model, revision=revision)
            selection = Selection(include, exclude, head, embeddings)
            asked = _choices(quantizer, options or {}, overrides)
            choices = [choice_of(choice, quality) for choice in asked]
            calibration = calibration_of(calibration, quality, choices)
            text = None if calibration is None else calibration_text(source, calibration, seed)
            check_processes(text, budget=isinstance(quantizer, Budget))
            chosen: Layout | Mixture
            if isinstance(quantizer, Budget):
                budget = replace(quantizer, choices=choices)
                chosen = find_mixture(source, budget, text, selection, seed=seed)
            else:
                patterns = [override.pattern for override in overrides]
                chosen = choose_layout(
                    source, choices, patterns, selection, calibration=text, seed=seed
                )
            if done is not None:
                if not chosen.made(done.record):
                    check_output(out, resume=resume)  # it is of another request
                check_contents(done, source, progress)
                logger.info("%s: it is finished; nothing is left to resume", out)
                return result_of(source, done.record, done.nbytes, PackingOutcome(), out)
            _warn_without_tokenizer(source)
        request = {**chosen.request, "max_shard_bytes": max_shard_bytes}
        nbytes = _disk_bytes(source, chosen, where)
        run = unfinished(source, out, request, nbytes, resume, progress)
        with run as (folder, resumes, contents):
            layout = (
                chosen.choose(where, folder, resume=resumes, progress=progress)
                if isinstance(chosen, Mixture)
                else chosen
            )
            record = layout.record.model_copy(update={"contents": contents})
            layout = replace(layout, record=record)
            outcome = _write_packed(
                source, layout, folder, where, max_shard_bytes, resume=resumes, progress=progress
            )
    seconds = time.perf_counter() - started
    result = result_of(source, layout.record, layout.nbytes, outcome, out, seconds, peak.nbytes)
    return result if layout.table is None else replace(result, allocation=layout.table)


def _choices(
    quantizer: str | Budget, options: Mapping[str, Any], overrides: Sequence[Override]
) -> list[Choice]:
    """The choices of a budget; or one for all layers, then one for each override."""
    if not isinstance(quantizer, Budget):
        return [Choice(quantizer, options), *(override.choice for override in overrides)]
    if options or overrides:
        raise OptionError(
            "budget: expected no options and no overrides beside it; name quantizers with their "
            "options in its choices"
        )
    return list(quantizer.choices)


def check_processes(text: CalibrationText | None, *, budget: bool) -> None:
    """Refuse a budget, tuning, and fewer samples than processes. Raises OptionError."""
    processes = world_size()
    if processes == 1:
        return
    tuning = text is not None and text.config.tuning is not None
    for name, asked in (("budget", budget), ("tuning", tuning)):
        if asked:
            raise OptionError(
                f"{name}: expected one process, got {processes}; start it without torchrun"
            )
    if text is not None and len(text.ids) < processes:
        raise OptionError(
            f"calibration: expected a sample for each of {processes} processes, got "
            f"{len(text.ids)}; give more text or fewer processes"
        )


def _disk_bytes(source: ModelSource, chosen: Layout | Mixture, device: torch.device) -> int:
    """The largest size of all files to write: checkpoint, hidden states, and moments."""
    nbytes, text = chosen.nbytes, chosen.calibration
    if text is None:
        return nbytes
    inside = block_prefixes(source)
    spill, states = text.config.spill, len(inside) + 1
    files = 1 if text.config.tuning is None else 2  # the dense model's hidden states too
    nbytes += files * spilled_bytes(text.ids.numel(), source.config, device, spill)
    weighs = text.config.weighting == "loss"
    measured = chosen.measured_tokens if isinstance(chosen, Mixture) else 0
    for tokens in (text.ids.numel() if weighs else 0, measured):
        nbytes += spilled_bytes(states * tokens, source.config, device, spill is not False)
    if weighs:
        nbytes += sum(
            moment_bytes(linear) for linear in chosen.linears
            if linear.name.startswith(inside)
            and any(uses_output_moment(linear, each) for each in chosen.candidates(linear.name))
        )  # fmt: skip
    return nbytes


def _warn_without_tokenizer(source: ModelSource) -> None:
    if not source.has_tokenizer:
        logger.warning(
            "model %s: it has no tokenizer files, such as %s, so the packed model has none; "
            "finetune, generate, chat and evaluate need them: put them into its folder, or later "
            "into the packed one",
            source.location.model,
            TOKENIZER_FILES[0],
        )


def _write_packed(
    source: ModelSource,
    layout: Layout,
    folder: Path,
    device: torch.device,
    max_shard_bytes: int,
    *,
    resume: bool,
    progress: Progress,
) -> PackingOutcome:
    """Write all files of ``layout`` into an unfinished folder."""
    writer = ShardWriter(folder, plan_shards(layout.tensors, max_shard_bytes), resume=resume)
    outcome = pack_all(source, layout, writer, device, progress)
    if not is_first():
        return outcome
    config = source.config
    config.architectures = [type(source.outline).__name__]
    config.quantization_config = layout.record.to_json()
    config.save_pretrained(folder)
    writer.finish()
    for name in (REQUEST, ERRORS_FILE):
        (folder / name).unlink(missing_ok=True)
    if (folder / WEIGHTING).is_dir():
        shutil.rmtree(folder / WEIGHTING)
    write_digests(folder)
    write_file(folder / CARD, model_card(layout.record))  # without a digest: people edit it
    return outcome
