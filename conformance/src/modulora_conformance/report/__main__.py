"""``python -m modulora_conformance.report FILE.json DIR``: the reports of a saved run, made again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from modulora_conformance.report import write_report
from modulora_conformance.report.reading import read_file
from modulora_core.errors import DataError


def main(arguments: list[str] | None = None) -> int:
    """Write the reports. Returns 0, or 2 for a file that isn't the JSON of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m modulora_conformance.report", description=__doc__
    )
    parser.add_argument("file", metavar="FILE.json", type=Path, help="what a run wrote")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write the reports")
    asked = parser.parse_args(arguments)
    try:
        run = read_file(asked.file)
        write_report(json.loads(asked.file.read_text(encoding="utf-8")), asked.folder)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(asked.folder / f"{run.quantizer}.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
