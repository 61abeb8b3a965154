"""Joins the JSON of layer.py, training.py and decoding.py to one table and one picture.

    python examples/benchmarks/summary.py layer.json training.json decoding.json --plot machine.svg

A column is a method. A model with a packed head replaces the one with a dense head. Numbers without
a unit are multiples of dense fp32 in the same turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from methods import BASE
from report import Result, describe, markdown, plot

BOTH, STEP, PEAK, RATE = "with backward", "step", "MiB", "tokens/s"
COLUMNS = ("1 row", "16 rows", "512 rows", BOTH, STEP, PEAK, RATE)


def cells(run: dict[str, Any], dtype: str) -> Iterator[tuple[str, str, float, str]]:
    """Method, column, value for the picture, and text for the table."""
    results = [each for each in run["results"] if each["dtype"] == dtype]
    for each in sorted(results, key=lambda result: ", head " in result["method"]):
        method = each["method"].partition(", head ")[0]
        ratio = each.get("ratio", 1.0)
        if run["benchmark"] == "layer":
            rows = f"{each['rows']} row{'s' * (each['rows'] > 1)}"
            column = rows if each["passes"] == "forward" else BOTH if each["rows"] == 512 else ""
            yield method, column, ratio, ratio_text(each, 1e3, "ms")
        elif run["benchmark"] == "training":
            peak = each["peak_memory_bytes"] / 2**20
            yield method, STEP, ratio, ratio_text(each, 1.0, "s")
            yield method, PEAK, peak, f"{peak:.0f}"
        elif run["benchmark"] == "decoding":
            rate = each["new_tokens"] / each["seconds"]
            yield method, RATE, rate, f"{rate:.1f}"


def ratio_text(result: Result, unit: float, name: str) -> str:
    seconds = f"{unit * result['seconds']:.2f} {name}"
    return seconds if result["method"] == BASE else f"{result['ratio']:.2f}"


def main(words: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
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
    table = [[name, *(column.get(name, "–") for column in shown.values())] for name in COLUMNS]
    print(markdown(["", *shown], table))
    if flags.plot is not None:
        panels = {column: list(values.items()) for column, values in bars.items() if values}
        plot(flags.plot, f"{runs[0]['environment']['cpu']}, {flags.dtype}", panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
