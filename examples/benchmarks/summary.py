"""One table and one picture of a machine, from the JSON of layer.py, training.py and decoding.py.

    python examples/benchmarks/summary.py layer.json training.json decoding.json --plot machine.svg

A row is a method. Models with a packed head replace those with a dense one. Ratios are multiples of
dense fp32 in the same turns; a method's inputs are fp32 too, unless --dtype says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from methods import BASE
from report import Bars, Result, describe, markdown, plot

BOTH, STEP, PEAK, RATE = "with backward", "step", "MiB", "tokens/s"
COLUMNS = ("1 row", "16 rows", "512 rows", BOTH, STEP, PEAK, RATE)


def cells(run: dict[str, Any], dtype: str) -> Iterator[tuple[str, str, float, str]]:
    """Method, column, value for the picture, and text for the table."""
    results = [each for each in run["results"] if each["dtype"] == dtype]
    for each in sorted(results, key=lambda result: "head" in result["method"]):
        method = each["method"].partition(",")[0]
        ratio = each.get("ratio", 1.0)
        if run["benchmark"] == "layer":
            rows = f"{each['rows']} row{'s' if each['rows'] > 1 else ''}"
            column = rows if each["passes"] == "forward" else BOTH if each["rows"] == 512 else ""
            yield method, column, ratio, _ratio(method, each, 1e3, "ms")
        elif run["benchmark"] == "training":
            peak = each["peak_memory_bytes"] / 2**20
            yield method, STEP, ratio, _ratio(method, each, 1.0, "s")
            yield method, PEAK, peak, f"{peak:.0f}"
        elif run["benchmark"] == "decoding":
            rate = each["new_tokens"] / each["seconds"]
            yield method, RATE, rate, f"{rate:.1f}"


def _ratio(method: str, result: Result, unit: float, name: str) -> str:
    seconds = f"{unit * result['seconds']:.2f} {name}"
    return seconds if method == BASE else f"{result['ratio']:.2f}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--dtype", default="float32", help="of the activations")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=".svg, .png or .pdf")
    flags = parser.parse_args(words)
    runs = [json.loads(file.read_text("utf-8")) for file in flags.files]
    shown: dict[str, dict[str, str]] = {}
    bars: dict[str, dict[str, float]] = {column: {} for column in COLUMNS}
    for run in runs:
        for method, column, value, text in cells(run, flags.dtype):
            if column in bars:
                shown.setdefault(method, {})[column] = text
                bars[column][method] = value
    print(describe(runs[0]["environment"]) + "\n")
    table = [[method, *(row.get(c, "–") for c in COLUMNS)] for method, row in shown.items()]
    print(markdown(["", *COLUMNS], table))
    if flags.plot is not None:
        panels: dict[str, Bars] = {c: list(b.items()) for c, b in bars.items() if b}
        plot(flags.plot, f"{runs[0]['environment']['cpu']}, {flags.dtype}", panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
