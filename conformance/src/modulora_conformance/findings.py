"""The findings of ``modulora doctor`` and ``modulora check-gpu``, and the report of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from modulora_core.cli.terminal import Report
from modulora_core.cli.text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

Verdict = Literal["ok", "note", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: the thing that was looked at, such as ``"torch"``.
        found: the version, size or state that was found.
        verdict: a note costs speed or a feature; with a fault something fails.
        advice: the command or the step that mends it; empty if nothing is wrong.
    """

    subject: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def report_of(found: list[Finding]) -> Report:
    """The report of all findings. Its exit code is 1 if there is a fault."""
    faults = sum(each.verdict == "fault" for each in found)
    notes = sum(each.verdict == "note" for each in found)
    verdict = f"{faults} faults, {notes} notes" if faults or notes else "Everything works."
    json = {"findings": [asdict(each) for each in found], "faults": faults, "notes": notes}
    return Report(json, _text(found, verdict), exit_code=int(faults > 0))


def reason(failure: Exception) -> str:
    """An exception in one line, for advice."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def _text(found: list[Finding], verdict: str) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for each in found:
        table.add_row(
            *(Text(visible(text), overflow="fold") for text in (each.subject, each.found))
        )
    wrong = [each for each in found if each.verdict != "ok"]
    lines = [Text(f"{each.verdict}: {each.subject}: {visible(each.advice)}") for each in wrong]
    return Group(table, "", *lines, Text(verdict))
