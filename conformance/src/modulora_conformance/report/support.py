"""One Markdown page from the results of several quantizers, to be committed, and checked in CI against fresh results.

::

    python -m modulora_conformance.report.support FOLDER --write docs/reference/support.md
    python -m modulora_conformance.report.support FOLDER --check docs/reference/support.md
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from modulora_conformance.report.markdown import escape, table
from modulora_conformance.report.reading import Run, read_file
from modulora_conformance.report.verdict import against
from modulora_core.errors import DataError

HEADER = """\
# Supported quantizers

The table has a row for each configuration that a quantizer promises, as the conformance kit
measured it. Bits per weight include scales, for a layer of 2048 × 2048.
The error is ‖W − Ŵ‖ / ‖W‖ for normal weights, packed without calibration. A certified run passes
all levels. It skips only missing hardware, and features that the quantizer does not offer.

"""

OTHERWISE = 1
"""The exit code where the page isn't what the results say."""


def page(runs: Sequence[Run]) -> str:
    """The page, quantizers in the order of their names."""
    runs = sorted(runs, key=lambda run: run.quantizer)
    open_points = [
        f"\n* {escape(run.quantizer)}: {escape(against(run))}" for run in runs if not run.certified
    ]
    return (
        HEADER
        + "\n".join(table(runs))
        + "\n"
        + "".join(open_points)
        + ("\n" if open_points else "")
    )


def complete_runs(folder: Path) -> tuple[list[Run], list[Run]]:
    """The results in ``folder``: those of complete runs, and the others.

    Raises:
        DataError: there are none, or one can't be read.
    """
    runs = [read_file(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise DataError(
            f"{folder}: expected the .json files of `modulora conformance NAME --report {folder}`, got none"
        )
    return [run for run in runs if run.complete], [run for run in runs if not run.complete]


def write(folder: Path, file: Path) -> None:
    """Write the page.

    Raises:
        DataError: as :func:`complete_runs`, and for a run that didn't cover everything.
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
    """The lines by which the page differs from what the results say; empty where it doesn't.

    Results of incomplete runs are left out, with a note on stderr.
    """
    complete, others = complete_runs(folder)
    for run in others:
        print(
            f"note: {run.quantizer}.json is of a run that wasn't complete, and is left out",
            file=sys.stderr,
        )
    found = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = found.splitlines(), page(complete).splitlines()
    return (
        []
        if lines[0] == lines[1]
        else list(difflib.unified_diff(*lines, str(file), "the results", lineterm="", n=0))
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 where the page differs, 2 for results that can't be used."""
    parser = argparse.ArgumentParser(
        prog="python -m modulora_conformance.report.support",
        description="A support page from results.",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="the .json files of complete runs"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", metavar="FILE", type=Path, help="write the page")
    what.add_argument(
        "--check", metavar="FILE", type=Path, help="fail where the page isn't what the results say"
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
    print("\n".join(difference), file=sys.stderr)
    print(f"error: {asked.check} isn't what the results in {asked.folder} say; write it anew: "
          f"python -m modulora_conformance.report.support {asked.folder} --write {asked.check}", file=sys.stderr)  # fmt: skip
    return OTHERWISE


if __name__ == "__main__":
    sys.exit(main())
