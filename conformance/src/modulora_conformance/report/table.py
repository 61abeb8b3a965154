"""The table of a run for a terminal."""

from __future__ import annotations

import io
from collections import Counter
from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modulora_conformance.report.numbers import share_text
from modulora_conformance.report.reading import Check, Run
from modulora_conformance.report.verdict import against, level_state, repeat
from modulora_conformance.results import GOLDEN, Kind

STYLES: dict[Kind, str] = {
    "passed": "green",
    "failed": "bold red",
    "blocked": "bold red",
    "xfailed": "yellow",
    "skipped": "dim",
}

KINDS: tuple[Kind, ...] = get_args(Kind)

NO_GOLDEN = "No golden vectors were held: --golden DIR, or `golden` of a subclass, names those that keep a format still."


def table(run: Run, width: int, *, color: bool) -> str:
    """A row a level, then failures, what was expected to fail, skips with their reasons, the verdict, whether golden vectors were held,
    and how to repeat the run.
    """
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
    )
    console.print(_levels(run))
    _tell(
        console, "FAILED", "bold red", [check for check in run.checks if check.outcome == "failed"]
    )
    _tell(
        console, "XFAILED", "yellow", [check for check in run.checks if check.outcome == "xfailed"]
    )
    _tell_skips(console, run)
    console.print(Text(against(run), style="bold green" if run.certified else "bold"))
    if "L1" in run.levels and not any(check.check.endswith(GOLDEN) for check in run.checks):
        console.print(Text(NO_GOLDEN, style="dim"), soft_wrap=True)
    console.print(
        Text(
            f"To repeat: {repeat(run)}"
            + (f"; in pytest: --hypothesis-seed={run.seed}" if run.seed else ""),
            style="dim",
        )
    )
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def _levels(run: Run) -> Table:
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    found.add_column("level")
    found.add_column("what", overflow="fold")
    for kind in KINDS:
        found.add_column(kind, justify="right")
    found.add_column("worst share of tolerance", justify="right")
    for level in sorted(run.levels):
        state = level_state(run.of(level))
        cells = [Text(level, style=STYLES[state]), Text(run.title(level), style=STYLES[state])]
        cells += [_count(run, level, kind) for kind in KINDS]
        errors = [measured.share for check in run.of(level) for measured in check.errors]
        found.add_row(*cells, share_text(max(errors)) if errors else "")
    return found


def _count(run: Run, level: str, kind: Kind) -> Text:
    number = run.levels[level].get(kind, 0)
    return Text(str(number), style=STYLES[kind]) if number else Text("-", style="dim")


def _tell(console: Console, word: str, style: str, checks: list[Check]) -> None:
    for check in checks:
        case = f" ({check.case})" if check.case else ""
        where = Text.assemble(
            (word, style), f" {check.level} {check.check}{case} [{check.configuration}]: "
        )
        console.print(where + Text(" ".join(check.reason.split())), soft_wrap=True)


def _tell_skips(console: Console, run: Run) -> None:
    reasons = Counter(check.reason for check in run.checks if check.outcome == "skipped")
    for reason, number in reasons.items():
        console.print(
            Text.assemble(("SKIPPED", "dim"), f" {number}: {' '.join(reason.split())}"),
            soft_wrap=True,
        )
