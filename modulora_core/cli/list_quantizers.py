"""``modulora list-quantizers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modulora_core.cli.terminal import Report
from modulora_core.cli.text import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modulora_core.registry import Entry


def command() -> Report:
    """List the installed quantizers, and say why one can't be used.

    Each quantizer is a package: install one with pip, and this list has it. The status is ok,
    broken (it can't be imported), incompatible (it needs another version of modulora-core) or
    blocked. MODULORA_BLOCK=NAME,... blocks quantizers.

    Examples:
        modulora list-quantizers
        modulora list-quantizers --json
        MODULORA_BLOCK=some-quantizer modulora list-quantizers
    """
    from modulora_core.registry import entries

    rows = [_to_json(entry) for entry in entries()]
    nothing = "No quantizer is installed. Each is a package: install one with pip."
    return Report({"quantizers": rows}, _table(rows) if rows else nothing)


def _to_json(entry: Entry) -> dict[str, Any]:
    spec = entry.spec
    return {
        "name": entry.name,
        "summary": spec.summary if spec else None,
        "bits": list(spec.bits) if spec else [],
        "protocol": spec.protocol if spec else None,
        "distribution": entry.distribution,
        "version": entry.version,
        "devices": list(spec.devices) if spec else [],
        "status": entry.status,
        "reason": entry.reason,
    }


def _table(rows: list[dict[str, Any]]) -> RenderableType:
    headings = ("name", "bits", "version", "distribution", "devices", "status", "summary or reason")
    return table(headings, map(_cells, rows))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bits, devices = ", ".join(f"{b:g}" for b in row["bits"]), ", ".join(row["devices"])
    package = (row["version"], row["distribution"])
    return row["name"], bits, *package, devices, row["status"], row["reason"] or row["summary"]
