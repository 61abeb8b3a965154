"""Runs pytest over the kit: ``python -m modulora_conformance NAME``.

It uses the kit's own pytest settings, and ignores the settings of the current folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

SETTINGS = Path(__file__).parent / "pytest.ini"


def main(arguments: list[str] | None = None) -> int:
    """Run the checks. Returns pytest's exit code: 0 all passed, 1 some failed, 4 wrong request."""
    import pytest

    asked = _parser().parse_args(arguments)
    words = ["--pyargs", "modulora_conformance", "-q", "--no-header", "-p", "no:cacheprovider"]
    words += ["-c", str(SETTINGS), "--quantizer", asked.name]
    words += [f"--conformance-level={asked.level}"]
    words += [f"--quantizer-option={option}" for option in asked.option]
    words += [f"--golden={asked.golden}"] if asked.golden else []
    words += [f"--hypothesis-seed={asked.seed}"] if asked.seed is not None else []
    words += ["--certified"] if asked.certified else []
    if asked.report:
        junit = asked.report / f"{asked.name}.xml"
        words += [f"--conformance-report={asked.report}", f"--junit-xml={junit}"]
    with tempfile.TemporaryDirectory() as scratch:
        # Hypothesis would create a folder in the current one
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", scratch)
        return int(pytest.main(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modulora_conformance", description="Check a ModuLoRA quantizer."
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="the quantizer")
    add("-o", "--option", metavar="KEY=VALUE", action="append", default=[], help="an option of it")
    add("--level", metavar="N", type=int, choices=range(8), default=7, help="run levels 0 to N")
    add("--report", metavar="DIR", type=Path, help="write the reports to DIR")
    add("--golden", metavar="DIR", type=Path, help="compare with the golden vectors in DIR")
    add("--seed", metavar="N", type=int, help="Hypothesis's seed, to repeat a run")
    add("--certified", action="store_true", help="allow skips for missing hardware only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
