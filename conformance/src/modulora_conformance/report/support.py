"""Writes support tables in Markdown: for one run, and as a page for several quantizers.

The text is the same whenever the same checks pass, so that it can be committed: no seconds, no
date, no machine. CI compares the committed page with new results::

    python -m modulora_conformance.report.support FOLDER --write docs/reference/support.md
    python -m modulora_conformance.report.support FOLDER --check docs/reference/support.md
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from modulora_conformance.report.verdict import Row, against, rows, verdict
from modulora_conformance.results import Run, read_file
from modulora_core.errors import DataError

HEADINGS = (
    "quantizer",
    "options",
    "bits per weight",
    "error, Gaussian weights",
    "merges",
    "serves",
    "branches",
    "certified (suite, protocol)",
)

NOT_COUNTED = "not counted"
"""The branches of a run without ``--branches``."""

HEADER = """\
# Supported quantizers

The table has a row for each configuration that a quantizer promises, as the conformance kit
measured it. Bits per weight include scales, for a layer of 2048 × 2048.
The error is ‖W − Ŵ‖ / ‖W‖ for normal weights, packed without calibration. "Merges" says whether
`modulora merge-packed` can put an adapter into such weights. "Serves" says what processes of
[vLLM](../how-to/serve.md#several-gpus) share of a weight: rows, columns, or nothing (whole). With
"graphs", CUDA graphs can record its products. A certified run passes all levels. It skips only
missing hardware, missing programs, and features that the quantizer does not offer. "Branches" says
which share of [the source's branches](conformance.md#branches) the checks ran. The author explains
the others. CI does not count them again.
"Without hardware" says that no check ran on a device that the quantizer's spec names.

"""

OTHERWISE = 1
"""The exit code if the page differs from the results."""

_SPECIAL = re.compile(r"([\\`*\[\]<>|&])")


def table(runs: Iterable[Run], known: Mapping[str, str] = MappingProxyType({})) -> str:
    """A table with a row for each configuration.

    Args:
        known: branches by quantizer and version, for runs that counted none.
    """
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for run in runs:
        name = f"{run.quantizer} {run.version}".strip()
        counted = run.branches.words if run.branches else known.get(name, NOT_COUNTED)
        lines += [
            (
                name,
                row.configuration,
                row.size or "-",
                row.error or "-",
                row.merges,
                row.serves,
                counted,
                f"{_certified(run, row)} ({run.suite}, {run.protocol})",
            )
            for row in rows(run)
        ]
    return "".join(f"| {' | '.join(map(escape, cells))} |\n" for cells in lines)


def _certified(run: Run, row: Row) -> str:
    if not run.certified:
        return f"no; passed: {row.levels}"
    return "without hardware" if run.untested else "yes"


def _counted(page: str) -> dict[str, str]:
    """The branches in a page, by quantizer and version."""
    lines = (line.split(" | ") for line in page.splitlines() if line.startswith("| "))
    return {cells[0].removeprefix("| "): cells[-2] for cells in lines}


def escape(text: str) -> str:
    """Text on one line for Markdown, so that a plugin's words make no markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def badge_and_table(run: Run) -> str:
    """A badge, a table, and the reasons against a certificate."""
    badge = f"![modulora conformance: {verdict(run).words}]({run.quantizer}.svg)"
    counted = f"\nThe checks ran {run.branches.words}.\n" if run.branches is not None else ""
    reasons = counted if run.certified else f"\n{escape(against(run))}\n"
    return f"{badge}\n\n{table([run])}{reasons}"


def page(runs: Sequence[Run], known: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page, with quantizers in alphabetical order; ``known`` as for :func:`table`."""
    runs = sorted(runs, key=lambda run: run.quantizer)
    reasons = [
        f"\n* {run.quantizer}: {escape(against(run))}\n" for run in runs if not run.certified
    ]
    return HEADER + table(runs, known) + "".join(reasons)


def complete_runs(folder: Path) -> tuple[list[Run], list[Run]]:
    """The results in ``folder``: complete runs, and others.

    Raises:
        DataError: there are none, or a file cannot be read.
    """
    runs = [read_file(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise DataError(
            f"{folder}: expected the .json files of `modulora conformance NAME --report {folder}`, "
            "got none"
        )
    return [run for run in runs if run.complete], [run for run in runs if not run.complete]


def write(folder: Path, file: Path) -> None:
    """Write the page.

    Raises:
        DataError: as :func:`complete_runs`; or a run is incomplete.
    """
    complete, others = complete_runs(folder)
    if others:
        names = ", ".join(run.quantizer for run in others)
        raise DataError(
            f"{folder}: expected complete runs, got parts of the checks for {names}; run "
            f"`modulora conformance NAME --report {folder}` without --level and without -o"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(complete), encoding="utf-8")


def check(folder: Path, file: Path) -> list[str]:
    """The lines of the page that differ from the results. Incomplete runs are ignored with a
    note, and so are the branches of runs that counted none."""
    complete, others = complete_runs(folder)
    for run in others:
        print(f"note: {run.quantizer}.json is an incomplete run, and is ignored", file=sys.stderr)
    found = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = found.splitlines(), page(complete, _counted(found)).splitlines()
    return list(difflib.unified_diff(*lines, str(file), "the results", lineterm="", n=0))


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 if the page differs, 2 if the results cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m modulora_conformance.report.support",
        description="Write a support page from results.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the .json files of runs")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", metavar="FILE", type=Path, help="write the page")
    action.add_argument(
        "--check", metavar="FILE", type=Path, help="fail if the page differs from the results"
    )
    asked = parser.parse_args(arguments)
    try:
        if asked.write is not None:
            write(asked.folder, asked.write)
            return 0
        difference = check(asked.folder, asked.check)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not difference:
        return 0
    command = f"python -m modulora_conformance.report.support {asked.folder} --write {asked.check}"
    print("\n".join(difference), file=sys.stderr)
    print(
        f"error: {asked.check}: expected the results in {asked.folder}, got another page; "
        f"write it again: {command}",
        file=sys.stderr,
    )
    return OTHERWISE


if __name__ == "__main__":
    sys.exit(main())
