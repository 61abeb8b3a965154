"""``modulora list-quantizers``."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report
from modulora_core.cli.text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modulora_core.registry import Entry
    from modulora_core.spec import QuantizerSpec


Check = Annotated[bool, option("--check", "Import each quantizer's class too, and so torch.")]


def command(check: Check = False) -> Report:
    """List the installed quantizers, and say why one can't be used.

    Each quantizer is a package: install one with pip, and this list has it. The status is ok,
    broken (it can't be imported), incompatible (it needs another version of modulora-core),
    duplicate (two packages bring it) or blocked. MODULORA_BLOCK=NAME,... blocks quantizers.
    A wrong location or a missing package shows when the class is imported: --check does so. Its
    exit code is 1 for a broken, incompatible or duplicate quantizer.

    Examples:
        modulora list-quantizers
        modulora list-quantizers --check --json
        MODULORA_BLOCK=some-quantizer modulora list-quantizers
    """
    from modulora_core.registry import entries

    found = [_checked(entry) for entry in entries()] if check else entries()
    rows = [_to_json(entry) for entry in found]
    nothing = "No quantizer is installed. Each is a package, and README lists ours."
    code = int(check and any(entry.status not in ("ok", "blocked") for entry in found))
    return Report({"quantizers": rows}, _table(rows) if rows else nothing, exit_code=code)


def _checked(entry: Entry[QuantizerSpec]) -> Entry[QuantizerSpec]:
    """Import the class of a usable entry, and mark the entry broken if that fails."""
    from modulora_core.errors import BrokenPluginError
    from modulora_core.registry import load

    if entry.status != "ok":
        return entry
    try:
        load(entry.name)
    except BrokenPluginError as error:
        return replace(entry, status="broken", reason=error.fault.partition(" is broken: ")[2])
    return entry


def _to_json(entry: Entry[QuantizerSpec]) -> dict[str, Any]:
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
    """A line of facts for each quantizer, and its summary, or why it can't be used, below it."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines = [("name", "bits", "kernels", "package", "status"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    heading, *facts = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines]
    parts: list[RenderableType] = [Text(heading, style="bold", no_wrap=True)]
    for fact, row in zip(facts, rows, strict=True):
        parts.append(Text(visible(fact)))
        parts.append(Padding(Text(visible(row["reason"] or row["summary"])), (0, 0, 0, 2)))
    return Group(*parts)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bits, devices = _bits(row["bits"]), ", ".join(row["devices"])
    package = f"{row['distribution']} {row['version']}"
    return row["name"], bits, devices, package, row["status"]


def _bits(found: list[float]) -> str:
    """``2, 3, 4``, or ``1 to 8`` if there are many, in equal steps of at most 1."""
    steps = {b - a for a, b in pairwise(found)}
    if len(found) > 4 and len(steps) == 1 and max(steps) <= 1:
        return f"{found[0]:g} to {found[-1]:g}"
    return ", ".join(f"{bits:g}" for bits in found)
