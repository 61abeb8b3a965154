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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modulora_core.arguments import checked
from modulora_core.calibration import CalibrationConfig, CalibrationText, calibration_text
from modulora_core.checkpoints.model_card import FILE as CARD
from modulora_core.checkpoints.model_card import model_card
from modulora_core.checkpoints.outputs import check_output, write_digests, write_file
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES, ShardWriter, plan_shards
from modulora_core.distributed import is_first, pick_device, together, world_size
from modulora_core.errors import OptionError, OutputError
from modulora_core.models import ModelSource, open_dense
from modulora_core.models.folders import REQUEST
from modulora_core.models.system_errors import usable_path
from modulora_core.models.tokenizer import TOKENIZER_FILES
from modulora_core.options import validate_model
from modulora_core.progress import Display, Progress, shown
from modulora_core.quantization.assignment import Assignment
from modulora_core.quantization.layout import Layout, choose_layout
from modulora_core.quantization.packer import WEIGHTING, PackingOutcome, disk_bytes, pack_all
from modulora_core.quantization.quality import Quality, with_quality
from modulora_core.quantization.resuming import check_finished, finished, unfinished
from modulora_core.registry import Choice

__all__ = ["Assignment", "Choice", "QuantizeResult", "quantize"]

logger = logging.getLogger(__name__)

MIXED = "mixed"
"""The name that a result gives to the quantizers of an assignment without a default."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A packed checkpoint that was written.

    Attributes:
        quantizer, options: the choice for the layers that match no pattern; ``"mixed"`` if they
            stay dense.
        bits_per_weight: the packed bits per packed weight, scales included.
        bytes: the size of all tensors; source_bytes: their size in the dense model.
        seconds: the duration; peak_memory_bytes: the peak memory of the process.
        weights: the number of packed weights; packed_by: the same by quantizer.
        kept: reason → names of the parameters that stayed dense.
        calibration: the samples; None without calibration.
        unreached: experts without a calibration token. They were packed with H = I.
        tuning_errors: by decoder block tuned in this run, its error on held-out samples before
            and after; None without tuning.
    """

    out: str
    quantizer: str
    options: dict[str, Any]
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory_bytes: int
    weights: int
    source_bytes: int
    kept: dict[str, list[str]]
    packed_by: dict[str, int]
    calibration: dict[str, Any] | None = None
    unreached: list[str] = field(default_factory=list)
    tuning_errors: dict[str, tuple[float, float]] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def result_of(
    source: ModelSource,
    record: QuantizationRecord,
    nbytes: int,
    outcome: PackingOutcome,
    out: Path,
    *,
    mixed: bool,
    seconds: float = 0.0,
    peak: int = 0,
) -> QuantizeResult:
    """The result for the checkpoint of a record with ``nbytes`` of tensors.

    Args:
        mixed: whether layers that match no pattern stay dense.
    """
    packed_by: dict[str, int] = {}
    for _, site in record.items():
        name = record.recipes[site.recipe].quantizer
        packed_by[name] = packed_by.get(name, 0) + site.numel
    return QuantizeResult(
        out=str(out),
        quantizer=MIXED if mixed else record.recipes[0].quantizer,
        options={} if mixed else dict(record.recipes[0].options),
        bits_per_weight=record.bits_per_weight,
        bytes=nbytes,
        seconds=seconds,
        peak_memory_bytes=peak,
        weights=sum(packed_by.values()),
        source_bytes=sum(info.nbytes for info in source.parameters.values()),
        kept=dict(record.kept),
        packed_by=packed_by,
        calibration=None if record.calibration is None else dict(record.calibration),
        unreached=list(outcome.unreached),
        tuning_errors=outcome.tuning_errors,
    )


@checked
def quantize(
    model: str | Path,
    out: str | Path,
    quantizer: str | Assignment,
    options: Mapping[str, Any] | None = None,
    *,
    quality: Quality = "balanced",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: Choice | str | None = None,
    embeddings: Choice | str | None = None,
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
        mixed = Assignment(default="NAME", layers={"*.down_proj": "NAME:bits=8"}, head="OTHER")
        quantize("org/model", "mixed", mixed, calibration=text)

    Args:
        model: a Hub id, a folder of safetensors, a file, or ``package:NAME``.
        out: a new or empty folder. It appears when it is whole.
        quantizer: a name of ``modulora list-quantizers``; or an :class:`Assignment`, which has a
            quantizer for each layer, for the head and for the embedding.
        options: the quantizer's options, the fields of its ``Options``.
        quality: ``"fast"`` and ``"best"`` change defaults of calibration and quantizers
            (:mod:`modulora_core.quantization.quality`).
        include: quantize only modules whose dotted path matches one of these patterns (fnmatch).
        exclude: leave modules dense that match one of these patterns.
        head: also quantize the output head, by ``NAME``, ``NAME:KEY=VALUE,...`` or a
            :class:`Choice`; embeddings: also the input embedding. In a tied model they are one
            table, and either packs both.
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
            assignment = _assignment(quantizer, options, head, embeddings)
            assignment, config = with_quality(assignment, calibration, quality)
            text = None if config is None else calibration_text(source, config, seed)
            _check_processes(text)
            layout = choose_layout(
                source, assignment, include=include, exclude=exclude, calibration=text, seed=seed
            )
            mixed = assignment.default is None
            if done is not None:
                check_finished(done, layout.record, source, progress)
                nothing = PackingOutcome()
                return result_of(source, done.record, done.nbytes, nothing, out, mixed=mixed)
            _warn_without_tokenizer(source)
        request = {**layout.record.to_json(), "max_shard_bytes": max_shard_bytes}
        nbytes = disk_bytes(source, layout, where)
        with unfinished(source, out, request, nbytes, resume, progress) as (folder, again, digest):
            layout = replace(layout, record=layout.record.model_copy(update={"contents": digest}))
            outcome = _write_packed(
                source, layout, folder, where, max_shard_bytes, resume=again, progress=progress
            )
    return result_of(
        source, layout.record, layout.nbytes, outcome, out, mixed=mixed,
        seconds=time.perf_counter() - started, peak=peak.nbytes,
    )  # fmt: skip


def _assignment(
    quantizer: str | Assignment,
    options: Mapping[str, Any] | None,
    head: Choice | str | None,
    embeddings: Choice | str | None,
) -> Assignment:
    if not isinstance(quantizer, Assignment):
        ends = {"head": head, "embeddings": embeddings}
        choice = Choice(quantizer, options or {})
        return validate_model("quantize", Assignment, {"default": choice, **ends})
    for name, given in (("options", options), ("head", head), ("embeddings", embeddings)):
        if given:
            raise OptionError(f"{name}: expected none beside an assignment; write it there")
    return quantizer


def _check_processes(text: CalibrationText | None) -> None:
    """Refuse tuning, and fewer samples than processes. Raises OptionError."""
    processes = world_size()
    if processes == 1 or text is None:
        return
    if text.config.tuning is not None:
        raise OptionError(
            f"tuning: expected one process, got {processes}; start it without torchrun"
        )
    if len(text.ids) < processes:
        raise OptionError(
            f"calibration: expected a sample for each of {processes} processes, got "
            f"{len(text.ids)}; give more text or fewer processes"
        )


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
    (folder / REQUEST).unlink(missing_ok=True)
    if (folder / WEIGHTING).is_dir():
        shutil.rmtree(folder / WEIGHTING)
    write_digests(folder)
    write_file(folder / CARD, model_card(layout.record))  # without a digest: people edit it
    return outcome
