"""``python -m modulora_conformance NAME``: pytest over the kit, with settings of its own and not those of the folder it is run in."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

SETTINGS = Path(__file__).parent / "pytest.ini"


def main(arguments: list[str] | None = None) -> int:
    """Run the checks. Returns pytest's exit code: 0 all passed, 1 some failed, 4 the request was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m modulora_conformance", description="Check a ModuLoRA quantizer."
    )
    parser.add_argument("name", metavar="NAME", help="the quantizer")
    parser.add_argument(
        "-o", "--option", metavar="KEY=VALUE", action="append", default=[], help="an option of it"
    )
    parser.add_argument(
        "--level", metavar="N", type=int, choices=range(8), default=7, help="run levels 0 to N"
    )
    parser.add_argument("--report", metavar="DIR", type=Path, help="write the reports there")
    parser.add_argument("--golden", metavar="DIR", type=Path, help="golden vectors to hold it to")
    parser.add_argument("--seed", metavar="N", type=int, help="of Hypothesis, to repeat a run")
    parser.add_argument(
        "--certified", action="store_true", help="allow no skip but that of missing hardware"
    )
    return run(parser.parse_args(arguments))


def run(asked: argparse.Namespace) -> int:
    """Run pytest in this process for the parsed arguments."""
    import pytest

    words = [
        "--pyargs",
        "modulora_conformance",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-c",
        str(SETTINGS),
    ]
    words += ["--quantizer", asked.name, "--conformance-level", str(asked.level)]
    for option in asked.option:
        words += ["--quantizer-option", option]
    if asked.report is not None:
        words += [
            "--conformance-report",
            str(asked.report),
            "--junit-xml",
            str(asked.report / f"{asked.name}.xml"),
        ]
    words += ["--golden", str(asked.golden)] if asked.golden is not None else []
    words += ["--hypothesis-seed", str(asked.seed)] if asked.seed is not None else []
    words += ["--certified"] if asked.certified else []
    with tempfile.TemporaryDirectory() as scratch:
        # Hypothesis would leave a folder where the command is run
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", scratch)
        return int(pytest.main(words))


if __name__ == "__main__":
    sys.exit(main())
