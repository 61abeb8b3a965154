"""``modulora list-quantizers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modulora_core.cli.terminal import Report

if TYPE_CHECKING:
    from rich.table import Table

    from modulora_core.registry import Entry


def command() -> Report:
    """List the installed quantizers, and say why one can't be used.

    A quantizer comes with a package of its own: install one with pip and it is in this list.
    MODULORA_BLOCK=NAME,... disables some. The status is ok, broken (it can't be read), incompatible (it was
    written for another version of the protocol) or blocked.

    Examples:
      modulora list-quantizers
      modulora list-quantizers --json
      MODULORA_BLOCK=some-quantizer modulora list-quantizers
    """
    from modulora_core.registry import entries

    found = entries()
    return Report(
        {"quantizers": [_to_json(entry) for entry in found]}, _table(found) if found else _NONE
    )


_NONE = "No quantizer is installed; each comes with a package of its own, to be installed by pip."


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


def _table(found: list[Entry]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in (
        "name",
        "bits",
        "version",
        "distribution",
        "devices",
        "status",
        "summary or reason",
    ):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for entry in found:
        row = _to_json(entry)
        bits, devices = ", ".join(f"{b:g}" for b in row["bits"]), ", ".join(row["devices"])
        told = entry.reason or row["summary"]
        cells = (entry.name, bits, entry.version, entry.distribution, devices, entry.status, told)
        table.add_row(*map(escape, cells))
    return table
