"""Prints the table of a run to a terminal."""

from __future__ import annotations

import io
from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modulora_conformance.report.verdict import against, repeat, share_text, worst
from modulora_conformance.results import GOLDEN, KINDS, Kind, Run

STYLES: dict[Kind, str] = {
    "passed": "green",
    "failed": "bold red",
    "blocked": "bold red",
    "xfailed": "yellow",
    "skipped": "dim",
}

NO_GOLDEN = (
    "No golden vectors were held: --golden DIR, or `golden` of a subclass, names the vectors that "
    "hold a format still."
)


def table_text(run: Run, width: int = 100, *, color: bool = False) -> str:
    """A row for each level, then failures, skips, the verdict, and the command that repeats the
    run."""
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
    )
    console.print(_levels(run))
    for kind in ("failed", "xfailed"):
        for check in run.checks:
            if check.outcome == kind:
                case = f" ({check.case})" if check.case else ""
                where = f" {check.level} {check.check}{case} [{check.configuration}]: "
                reason = " ".join(check.reason.split())
                line = Text.assemble((kind.upper(), STYLES[check.outcome]), where, reason)
                console.print(line, soft_wrap=True)
    skips = Counter(check.reason for check in run.checks if check.outcome == "skipped")
    for reason, number in skips.items():
        line = Text.assemble(("SKIPPED", "dim"), f" {number}: {' '.join(reason.split())}")
        console.print(line, soft_wrap=True)
    console.print(Text(against(run), style="bold green" if run.certified else "bold"))
    if "L1" in run.levels and not any(check.check.endswith(GOLDEN) for check in run.checks):
        console.print(Text(NO_GOLDEN, style="dim"), soft_wrap=True)
    seed = f"; in pytest: --hypothesis-seed={run.seed}" if run.seed else ""
    console.print(Text(f"To repeat: {repeat(run)}{seed}", style="dim"))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def _levels(run: Run) -> Table:
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    found.add_column("level")
    found.add_column("name", overflow="fold")
    for heading in (*KINDS, "worst share of tolerance"):
        found.add_column(heading, justify="right")
    for level, counts in run.levels.items():
        style = STYLES[worst(run.of(level))]
        numbers = [
            Text(str(counts[kind]), STYLES[kind]) if counts[kind] else Text("-", "dim")
            for kind in KINDS
        ]
        measured = [m for check in run.of(level) for m in check.measurements]
        shares = [m.share for m in measured if m.unit == "relative"]
        share = share_text(max(shares)) if shares else ""
        found.add_row(Text(level, style), Text(run.title(level), style), *numbers, share)
    return found
