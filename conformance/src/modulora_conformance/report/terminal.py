"""Prints the summary of a run to a terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from modulora_conformance.checks import explanation
from modulora_conformance.report.verdict import against, duration, repeat, share_text, worst
from modulora_conformance.results import GOLDEN, KINDS, Branches, Kind, Outcome, Run

STYLES: dict[Kind, str] = {
    "passed": "green",
    "failed": "bold red",
    "blocked": "bold red",
    "xfailed": "yellow",
    "skipped": "dim",
}

SHOWN = 3
"""The most cases of a check that are listed; the others are counted."""

HOW_TO_SEE_MORE = "-k CHECK runs one check, and --tb short shows its traceback."

NOT_RUN = (
    "Remove each branch, write it as plain code, or explain it in the plugin's pyproject.toml: "
    "not_covered under [tool.modulora.conformance]."
)

NO_GOLDEN = "No golden vectors: --golden DIR compares stored bytes with those of earlier versions."


def summary_text(run: Run, width: int = 100, *, color: bool = False, failures: bool = True) -> str:
    """The verdict, each failed check once with its cases and meaning, a row for each level, and
    the command that repeats the run.

    Args:
        failures: False if something else lists the failures.
    """
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
    )
    style = "bold green" if run.sound else "bold red" if run.failures else "bold"
    whole = not color  # in a file or a pipe: lines are searched
    console.print(Text(against(run), style), soft_wrap=whole)
    for kind in ("failed", "xfailed"):
        found = [check for check in run.checks if check.outcome == kind]
        for name in dict.fromkeys(check.check for check in found) if failures else ():
            console.print()
            _print_check(console, run, [check for check in found if check.check == name])
    console.print()
    console.print(_levels(run))
    if run.failures and failures:
        console.print(Text(HOW_TO_SEE_MORE, "dim"), soft_wrap=whole)
    if run.branches is not None:
        for line in _branches(run.branches):
            console.print(Text(line), soft_wrap=whole)
    for line in _notes(run):
        console.print(Text(line, "dim"), soft_wrap=whole)
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def _print_check(console: Console, run: Run, cases: list[Outcome]) -> None:
    """One check: its name, the messages of its cases, and the docstring."""
    first = cases[0]
    head = Text.assemble((first.outcome.upper(), STYLES[first.outcome]), f" {first.level} ")
    console.print(head + Text(first.check, "bold"), soft_wrap=True)
    for check in cases[:SHOWN]:
        case = f" ({check.case})" if check.case else ""
        line = f"  [{check.configuration}]{case}: {' '.join(check.reason.split())}"
        console.print(Text(line), soft_wrap=True)
    if len(cases) > SHOWN:
        console.print(Text(f"  and {len(cases) - SHOWN} more cases"))
    meaning = " ".join(explanation(run.meanings.get(first.check, "")))
    console.print(Padding(Text(meaning, "dim"), (0, 0, 0, 2)))


def _branches(found: Branches) -> Iterator[str]:
    """The count, each branch that no check ran, and the explanations that explain nothing."""
    yield f"\nThe checks ran {found.words}."
    for branch in found.missing:
        yield f"  not run: {branch.file}:{branch.line}"
        yield f"           {branch.name}"
    if found.missing:
        yield NOT_RUN
        yield from (f"  a tour met: {note}" for note in found.notes)
    for name in found.stale:
        yield f"  not_covered explains what ran, or is not there: {name}; remove it"


def _notes(run: Run) -> Iterator[str]:
    skips = Counter(check.reason for check in run.checks if check.outcome == "skipped")
    for reason, number in skips.items():
        yield f"SKIPPED {number}: {' '.join(reason.split())}"
    for check in run.checks:
        yield from (f"[{check.configuration}] {note}" for note in check.notes)
    for name, seconds in run.packing.items():
        yield f"{name}: {duration(seconds)}, once for all checks"
    if "L1" in run.levels and not any(check.check.endswith(GOLDEN) for check in run.checks):
        yield NO_GOLDEN
    seed = f" (pytest: --hypothesis-seed={run.seed})" if run.seed else ""
    yield f"To repeat: {repeat(run)}{seed}"


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
