"""``modulora info``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modulora_core.cli.allocation_table import with_allocation
from modulora_core.cli.counted import counted
from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report

if TYPE_CHECKING:
    from modulora_core.checkpoints.checkpoint import PackedCheckpoint

PathArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        show_default=False,
        help="A packed checkpoint or an adapter: a folder or a Hub id.",
    ),
]


def command(path: PathArgument) -> Report:
    """Tell what a checkpoint or an adapter holds: sizes, bits per weight, and where it came from.

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
    groups = [
        {
            **recipe.to_json(),
            "parameters": sum(site.recipe == index for _, site in record.items()),
            "weights": sum(site.weights for _, site in record.items() if site.recipe == index),
            "bytes": sum(site.nbytes for _, site in record.items() if site.recipe == index),
        }
        for index, recipe in enumerate(record.recipes)
    ]
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
    origin = (
        f"made from {name} by modulora-core {record.core_version}"
        if checkpoint.foreign is None
        else f"{name} in the format {checkpoint.format}"
    )
    lines = [
        f"{facts['architecture']}, {origin}",
        f"{format_size(checkpoint.nbytes)}, of which {format_size(record.nbytes)} packed at {record.bits_per_weight:.3f} bits per weight",
    ]
    lines += _calibrated(record.calibration)
    for group in groups:
        options = (
            ", ".join(f"{key}={value}" for key, value in group["options"].items()) or "no options"
        )
        bits = 8 * group["bytes"] / max(1, group["weights"])
        holds = (
            f"{counted(group['parameters'], 'parameter')}, {counted(group['weights'], 'weight')}"
        )
        made_by = f"{group['quantizer']} ({options}) of {group['distribution']} {group['version']}"
        lines.append(f"  {made_by}: {holds}, {bits:.3f} bits each")
    lines += [f"  not quantized, {reason}: {len(names)}" for reason, names in record.kept.items()]
    return Report(facts, with_allocation("\n".join(lines), facts["allocation"]))


def _allocation(checkpoint: PackedCheckpoint) -> dict[str, Any] | None:
    """What went where, if a budget chose."""
    record = checkpoint.record
    if record.allocation is None:
        return None
    from modulora_core.quantization.mixed import recorded_allocation

    return recorded_allocation(record, checkpoint.nbytes - record.nbytes)


def _calibrated(calibration: Mapping[str, Any] | None) -> list[str]:
    if calibration is None:
        return []
    samples = _counted(calibration.get("samples"), "sample")
    told = f"calibrated on {samples} of {calibration.get('seq_len', '?')} tokens of {calibration.get('source', '?')}"
    tuning = calibration.get("tuning")
    if tuning is not None:
        epochs = _counted(tuning.get("epochs"), "epoch")
        told += f", blocks tuned: {epochs} at learning rate {tuning.get('learning_rate', '?')}"
    return [told]


def _counted(number: object, noun: str) -> str:
    """A number of a record, in which a reader may find less than we write."""
    return counted(number, noun) if isinstance(number, int) else f"? {noun}s"


def _adapter(path: str) -> Report:
    from modulora_core.adapters.peft_format import AdapterFolder

    adapter = AdapterFolder(path)
    ranks = sorted({rank for _, rank, _ in adapter.shapes.values()})
    scaled = adapter.has_channel_scales
    parameters = sum((out + in_) * (r + scaled) for out, r, in_ in adapter.shapes.values())
    base = adapter.record.base if adapter.record is not None else None
    name = base.name if base is not None else adapter.config.get("base_model_name_or_path")
    quantizers = [dict(q) for q in base.quantizers] if base is not None else []
    facts = {"kind": "adapter", "modules": len(adapter), "ranks": ranks, "channel_scales": scaled,
             "parameters": parameters, "base": name, "base_quantizers": quantizers, "config": dict(adapter.config)}  # fmt: skip
    made_on = ", ".join(q["quantizer"] for q in quantizers) or "not recorded"
    made_of = f"rank {', '.join(map(str, ranks))}" + (" and channel scales" if scaled else "")
    text = (f"LoRA adapter of {counted(len(adapter), 'module')}, {made_of}, {counted(parameters, 'parameter')}\n"
            f"made for {name} (quantizer: {made_on})")  # fmt: skip
    return Report(facts, text)
