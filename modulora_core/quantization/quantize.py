"""From a dense model to a packed checkpoint, a parameter or, with calibration, a decoder block at a time.

:func:`~modulora_core.quantization.layout.plan_quantization` does all that can be refused, and knows every byte that will be
written; :func:`quantize` then streams: what is read (memory-mapped) is packed, written to its place, and dropped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from modulora_core.calibration import (
    CalibrationConfig,
    CalibrationText,
    check_seq_len,
    load_calibration,
    spill_bytes,
)
from modulora_core.checkpoints.outputs import (
    SMALL_FILES,
    check_disk_space,
    check_output,
    partial_name,
    whole_or_nothing,
    write_file,
)
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES, ShardWriter
from modulora_core.devices import pick_device
from modulora_core.devices.memory import PeakMemory
from modulora_core.errors import CheckpointError
from modulora_core.models import ModelSource, open_model
from modulora_core.models.progress import Progress
from modulora_core.models.tokenizer_files import TOKENIZER_FILES
from modulora_core.models.unfinished import REQUEST
from modulora_core.quantization.layout import Override, Plan, plan_quantization
from modulora_core.quantization.packer import Packed, pack_all
from modulora_core.registry import Choice

__all__ = [
    "Choice",
    "Override",
    "QuantizeResult",
    "plan_quantization",
    "quantize",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What was written.

    Attributes:
        bits_per_weight: of the ``weights`` packed weights, everything counted.
        packed_by: how many weights each quantizer packed, by its name.
        bytes: of all tensors written; source_bytes: of the same parameters before.
        kept: what was not quantized: reason → names.
        calibration: the samples that were used; None without calibration.
        unreached: experts that no calibration token was routed to: packed as if all inputs mattered alike.
        tuning_errors: of each decoder block that this run tuned, its error on samples held out, before and after; None
            without tuning.
        allocation: what went where and why (:func:`modulora_core.quantization.mixed.run.quantize_mixed`), if a budget decided.
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
    allocation: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    model: str,
    out: str | Path,
    quantizer: str,
    options: Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[Override] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: Choice | None = None,
    embeddings: Choice | None = None,
    calibration: CalibrationConfig | None = None,
    device: str = "cpu",
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize ``model`` into the folder ``out``.

    Args:
        model: a Hub id, a folder of safetensors, a ``.gguf`` file, or ``package:NAME``.
        out: a new or empty folder. It appears whole or not at all.
        quantizer: the plugin's name; options: of its ``Options``.
        overrides: other quantizers for some modules; the last that matches holds.
        include, exclude: fnmatch patterns on module paths (:func:`modulora_core.models.sites.find_sites`).
        head, embeddings: quantizers for the output head and the input embedding, which stay dense without; in a tied model they are
            one table, which either of the two packs.
        calibration: the text whose tokens tell a quantizer which inputs matter, and whether blocks are tuned on it.
        device: where packing is computed. The checkpoint is the same kind of folder whatever the device.
        seed: for quantizers that draw random numbers; each parameter has its own stream.
        resume: go on with ``out.partial`` of a killed run of the same request, on the same kind of machine: packed
            parameters (with tuning: whole blocks) are kept, and the bytes are those of a run that wasn't killed. Where
            nothing was begun, begin. Without it such a folder is refused.

    Raises:
        RequestError: anything that can be known beforehand, before any work. WorkError: what can't.
    """
    started = time.perf_counter()
    where = pick_device(device)
    with PeakMemory(where) as peak:
        out = Path(out)
        check_output(out, resume=resume)
        source = open_model(model, revision=revision)
        text = None if calibration is None else calibration_text(source, calibration, seed)
        plan = plan_quantization(
            source, quantizer, options, overrides=overrides, include=include, exclude=exclude, head=head, embeddings=embeddings,
            calibration=text, seed=seed, max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
        _warn_without_tokenizer(source)
        request = {**plan.record.to_json(), "max_shard_bytes": max_shard_bytes}
        before = request_before(out, request, resume=resume)
        spilled = 0 if text is None else spill_bytes(text, source.config, where)
        check_disk_space(out, plan.nbytes + SMALL_FILES + spilled)
        contents = check_values(source, out, before, progress)
        with whole_or_nothing(out, resume=bool(before)) as folder:
            write_request(folder, request, contents)
            packed = write_packed(
                source, plan, folder, where, resume=bool(before), progress=progress
            )
    first = plan.record.recipes[0]
    return result_of(
        source, plan, packed, out=out, quantizer=first.quantizer, options=first.options,
        seconds=time.perf_counter() - started, peak=peak,
    )  # fmt: skip


def calibration_text(source: ModelSource, config: CalibrationConfig, seed: int) -> CalibrationText:
    """The samples. Raises OptionError, DataError, MissingExtraError, ModelError where there are none for this model."""
    check_seq_len(config, source.config)
    return load_calibration(config, source.tokenizer(), seed=seed)


def _warn_without_tokenizer(source: ModelSource) -> None:
    if not source.has_tokenizer:
        logger.warning(
            "model %s: it has no tokenizer files, such as %s, and so the packed one will have none: finetune, generate, chat and "
            "evaluate need them; put them into its folder, or into the packed one later", source.location.model, TOKENIZER_FILES[0],
        )  # fmt: skip


def request_before(out: Path, request: Mapping[str, Any], *, resume: bool) -> dict[str, Any]:
    """What the unfinished run was asked for that shall be resumed; empty if there is none.

    Raises:
        CheckpointError: that wasn't ``request``; the message says what differs.
    """
    path = partial_name(out) / REQUEST
    if not (resume and path.is_file()):
        return {}
    before = dict(json.loads(path.read_text()))
    changed = [key for key in request if request[key] != before["record"].get(key)]
    if changed:
        raise _another(partial_name(out), ", ".join(changed))
    return before


def check_values(
    source: ModelSource, out: Path, before: Mapping[str, Any], progress: Progress | None
) -> str:
    """Read every weight once; a SHA-256 of them.

    Raises:
        CheckpointError: a weight is missing or of another shape, or they aren't those of the unfinished run.
        WeightError: NaN or Inf in a weight.
    """
    source.validate()
    contents = source.check_finite(_named(progress, "checking"))
    if before.get("contents", contents) != contents:
        raise _another(partial_name(out), "the values of the model's weights")
    return contents


def write_request(folder: Path, request: Mapping[str, Any], contents: str) -> None:
    """Note what an unfinished folder is of, for :func:`request_before`."""
    write_file(folder / REQUEST, json.dumps({"record": request, "contents": contents}))


def write_packed(
    source: ModelSource,
    plan: Plan,
    folder: Path,
    device: torch.device,
    *,
    resume: bool,
    progress: Progress | None,
) -> Packed:
    """Everything that ``plan`` says, into an unfinished folder.

    Raises:
        ModelError, WorkError: as :func:`modulora_core.quantization.packer.pack_all`.
    """
    writer = ShardWriter(folder, plan.shards, resume=resume)
    packed = pack_all(source, plan, writer, device, progress)
    _write_config(source, plan.record, folder)
    source.copy_tokenizer(folder)
    writer.finish()
    (folder / REQUEST).unlink()
    return packed


def result_of(
    source: ModelSource,
    plan: Plan,
    packed: Packed,
    *,
    out: Path,
    quantizer: str,
    options: Mapping[str, Any],
    seconds: float,
    peak: PeakMemory,
    allocation: dict[str, Any] | None = None,
) -> QuantizeResult:
    """What is told of a checkpoint that was written."""
    text = plan.calibration
    return QuantizeResult(
        out=str(out), quantizer=quantizer, options=dict(options), bits_per_weight=plan.record.bits_per_weight,
        bytes=plan.nbytes, seconds=seconds, peak_memory_bytes=peak.nbytes,
        weights=sum(site.weights for _, site in plan.record.items()),
        source_bytes=sum(info.nbytes for info in source.parameters.values()),
        kept=dict(plan.record.kept), packed_by=_packed_by(plan.record),
        calibration=None if text is None else text.to_json(), unreached=list(packed.unreached),
        tuning_errors=None if text is None or text.config.tuning is None else _rounded(packed.tuning_errors),
        allocation=allocation,
    )  # fmt: skip


def _packed_by(record: QuantizationRecord) -> dict[str, int]:
    weights: dict[str, int] = {}
    for _, site in record.items():
        name = record.recipes[site.recipe].quantizer
        weights[name] = weights.get(name, 0) + site.weights
    return weights


def _rounded(errors: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """To four digits."""
    return {
        path: (float(f"{before:.4g}"), float(f"{after:.4g}"))
        for path, (before, after) in errors.items()
    }


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def _another(folder: Path, difference: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: an unfinished run of another request (differs in {difference}); ask for the same, or remove the folder to start "
        "again without --resume"
    )


def _write_config(source: ModelSource, record: QuantizationRecord, folder: Path) -> None:
    config = source.config
    config.architectures = [type(source.skeleton()).__name__]
    config.quantization_config = record.to_json()
    config.save_pretrained(folder)
