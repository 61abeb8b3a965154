"""``modulora info``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli.allocation import with_allocation
from modulora_core.cli.arguments import argument
from modulora_core.cli.terminal import Report
from modulora_core.cli.text import counted, format_size

if TYPE_CHECKING:
    from modulora_core.checkpoints.checkpoint import PackedCheckpoint
    from modulora_core.checkpoints.record import QuantizationRecord

Checked = Annotated[str, argument("PATH", "A checkpoint or an adapter: a folder or a Hub id.")]


def command(path: Checked) -> Report:
    """Show what a packed checkpoint or an adapter contains.

    It prints sizes, bits per weight, quantizers with their options, and the original model.

    Examples:
        modulora info smollm2-packed
        modulora info my-adapter --json
    """
    if (Path(path) / "adapter_config.json").is_file():
        return _adapter(path)
    from modulora_core.checkpoints.checkpoint import open_checkpoint

    return _checkpoint(open_checkpoint(path))


def _checkpoint(checkpoint: PackedCheckpoint) -> Report:
    record = checkpoint.record
    groups = _groups(record)
    facts: dict[str, Any] = {
        "kind": "checkpoint",
        "format": checkpoint.format,
        "architecture": checkpoint.config.get("architectures", [None])[0],
        "bits_per_weight": record.bits_per_weight,
        "packed_bytes": record.nbytes,
        "bytes": checkpoint.nbytes,
        "source": dict(record.source),
        "core_version": record.core_version,
        "calibration": None if record.calibration is None else dict(record.calibration),
        "quantizers": groups,
        "kept": {reason: list(names) for reason, names in record.kept.items()},
        "allocation": _allocation(checkpoint),
    }
    name = record.source.get("name", "an unknown model")
    ours = f"made from {name} by modulora-core {record.core_version}"
    foreign = f"{name} in the format {checkpoint.format}"
    lines = [
        f"{facts['architecture']}, {ours if checkpoint.foreign is None else foreign}",
        f"{format_size(checkpoint.nbytes)}, of which {format_size(record.nbytes)} packed at "
        f"{record.bits_per_weight:.3f} bits per weight",
        *_calibrated(record.calibration),
        *map(_group_line, groups),
        *(f"  not quantized, {reason}: {len(names)}" for reason, names in record.kept.items()),
    ]
    return Report(facts, with_allocation("\n".join(lines), facts["allocation"]))


def _groups(record: QuantizationRecord) -> list[dict[str, Any]]:
    """Count what each quantizer packed."""
    nothing = {"parameters": 0, "weights": 0, "bytes": 0}
    groups = [{**recipe.to_json(), **nothing} for recipe in record.recipes]
    for _, site in record.items():
        group = groups[site.recipe]
        group["parameters"] += 1
        group["weights"] += site.weights
        group["bytes"] += site.nbytes
    return groups


def _group_line(group: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in group["options"].items())
    bits = 8 * group["bytes"] / max(1, group["weights"])
    return (
        f"  {group['quantizer']} ({options or 'no options'}) of {group['distribution']} "
        f"{group['version']}: {counted(group['parameters'], 'parameter')}, "
        f"{counted(group['weights'], 'weight')}, {bits:.3f} bits each"
    )


def _allocation(checkpoint: PackedCheckpoint) -> dict[str, Any] | None:
    record = checkpoint.record
    if record.allocation is None:
        return None
    from modulora_core.quantization.mixed import recorded_allocation

    return recorded_allocation(record, checkpoint.nbytes - record.nbytes)


def _calibrated(calibration: Mapping[str, Any] | None) -> list[str]:
    """Describe the calibration of a record, which may lack any of its entries."""
    if calibration is None:
        return []
    samples, seq_len, source = (
        calibration.get(key, "?") for key in ("samples", "seq_len", "source")
    )
    text = f"calibrated on {samples} × {seq_len} tokens of {source}"
    if (tuning := calibration.get("tuning")) is not None:
        epochs, rate = (tuning.get(key, "?") for key in ("epochs", "learning_rate"))
        text += f", blocks tuned (epochs {epochs}, learning rate {rate})"
    return [text]


def _adapter(path: str) -> Report:
    from modulora_core.adapters.peft_format import AdapterFolder

    adapter = AdapterFolder(path)
    scaled = adapter.has_channel_scales
    base = None if adapter.record is None else adapter.record.base
    facts: dict[str, Any] = {
        "kind": "adapter",
        "modules": len(adapter),
        "ranks": sorted({rank for _, rank, _ in adapter.shapes.values()}),
        "channel_scales": scaled,
        "parameters": sum((out + in_) * (r + scaled) for out, r, in_ in adapter.shapes.values()),
        "base": adapter.config.get("base_model_name_or_path") if base is None else base.name,
        "base_quantizers": [] if base is None else [dict(q) for q in base.quantizers],
        "config": dict(adapter.config),
    }
    packed_by = ", ".join(q["quantizer"] for q in facts["base_quantizers"]) or "not recorded"
    text = (
        f"LoRA adapter of {counted(len(adapter), 'module')}, "
        f"rank {', '.join(map(str, facts['ranks']))}{' and channel scales' if scaled else ''}, "
        f"{counted(facts['parameters'], 'parameter')}\n"
        f"made for {facts['base']} (quantizer: {packed_by})"
    )
    return Report(facts, text)
