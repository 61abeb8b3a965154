"""The result of a quantization: what was packed, into how many bits, at which cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.models import ModelSource
from modulora_core.quantization.packer import PackingOutcome

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
        source: the dense model.
        mixed: whether layers that match no pattern stay dense.
        peak: in bytes.
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
