"""What the benchmarks share around measuring: flags, the choice of methods, the machine, tables, pictures and JSON.

Results are dicts of plain values: ``method``, what identifies the case, ``seconds`` and so on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from methods import BASE, Dense, Method, Packed, promised
from peers import PEERS
from turns import VERBOSE, Asked, Here, NotMeasuredError, Process

Result = dict[str, Any]

LIBRARIES = ("torch", "transformers", "numba", "modulora-core", "bitsandbytes", "hqq", "optimum-quanto", "torchao", "gptqmodel", "peft",
             "llama-cpp-python")  # fmt: skip


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-q", "--quantizers", nargs="*", metavar="NAME[:OPTION=VALUE,...]",
        help="ours; by default all that are installed, in all configurations that they promise")  # fmt: skip
    add("-p", "--peers", nargs="*", metavar="NAME",
        help=f"by default all of {', '.join(peer.name for peer in PEERS)}; a name's beginning takes all that begin so")  # fmt: skip
    add("--repeats", type=int, help="turns that each method takes")
    add(
        "--limit",
        type=float,
        default=60.0,
        help="a method that took so many seconds takes no more turns",
    )
    add("--threads", type=int, help="torch's number of threads, which all follow")
    add("--quick", action="store_true", help="smaller and fewer: to see that it works")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="draw it (.svg, .png, .pdf); takes matplotlib")
    add("--verbose", action="store_true", help="let libraries print, and failures their traceback")
    add("--one-process", action="store_true", help="all in this process: for a debugger")
    return parser


@dataclass
class Run:
    """One run of a benchmark: who takes part, and what came out."""

    benchmark: str
    flags: argparse.Namespace
    methods: dict[str, Method] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._environment = environment(self.flags.threads)
        if self.flags.verbose:
            os.environ[VERBOSE] = "1"
        for method in chosen(self.flags):
            if self.benchmark not in method.benchmarks:
                if self.flags.peers is not None and method.name in self.flags.peers:
                    self.skip(method.name, f"it takes no part in {self.benchmark}.py")
            elif (lacking := method.missing()) is not None:
                self.skip(method.name, lacking)
            else:
                self.methods[method.name] = method

    def skip(self, method: str, why: str, case: str = "") -> None:
        """Note that something isn't measured, and say so."""
        self.not_measured.append({"method": method, "case": case, "reason": why})
        print(
            f"{method}{', ' if case else ''}{case}: not measured: {why}",
            file=sys.stderr,
            flush=True,
        )

    def start(self, build: Callable[..., object], *shared: Any) -> dict[str, Asked]:
        """A job for each method, by name: ``build(method, *shared)`` in a process of its own. Those that fail are noted."""
        jobs: dict[str, Asked] = {}
        for name, method in list(self.methods.items()):
            self.say(f"starting {name}")
            try:
                jobs[name] = self.job(build, method, *shared)
            except NotMeasuredError as error:
                self.skip(name, str(error))
        return jobs

    def job(self, build: Callable[..., object], *shared: Any) -> Asked:
        if self.flags.one_process:
            return Here(started, self.flags.threads, build, *shared)
        return Process(started, self.flags.threads, build, *shared)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _by_reason(self) -> dict[tuple[str, str], list[str]]:
        reasons: dict[tuple[str, str], list[str]] = {}
        for line in self.not_measured:
            cases = reasons.setdefault((line["method"], line["reason"]), [])
            cases += [line["case"]] if line["case"] else []
        return reasons

    def to_json(self) -> dict[str, Any]:
        shown = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.flags).items()}
        return {
            "benchmark": self.benchmark, "environment": self._environment, "settings": shown, "results": self.results,
            "not_measured": self.not_measured,
        }  # fmt: skip

    def finish(
        self, tables: Iterable[tuple[str, str]], panels: Callable[[], Mapping[str, Bars]]
    ) -> int:
        """Print the tables, write what was asked for. Returns the exit code: 1 where nothing was measured."""
        print(f"{self.benchmark}: {describe(self._environment)}")
        for title, text in tables:
            print(f"\n{title}\n\n{text}")
        for (method, why), cases in self._by_reason().items():
            where = f" ({'; '.join(cases)})" if cases else ""
            print(f"\n{method}{where}: not measured: {why}")
        if self.flags.json is not None:
            self.flags.json.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        if self.flags.plot is not None and self.results:
            try:
                plot(self.flags.plot, f"{self.benchmark}: {self._environment['cpu']}", panels())
            except ImportError:
                self.say("no picture: matplotlib isn't installed; pip install matplotlib")
        return 0 if self.results else 1


def chosen(flags: argparse.Namespace) -> list[Method]:
    """The dense method, ours and the peers. Ends the program where a peer isn't known."""
    ours: list[Method] = [
        Packed(words) for words in (promised() if flags.quantizers is None else flags.quantizers)
    ]
    for words in flags.quantizers or ():
        ours += [Packed(words, kib) for kib in getattr(flags, "tiles", ())]
    if getattr(flags, "quantize_head", None) is not None:
        ours += [Packed(words, head=flags.quantize_head) for words in flags.quantizers or ()]
    wanted = [peer.name for peer in PEERS] if flags.peers is None else flags.peers
    for name in wanted:
        if not any(peer.name.startswith(name) for peer in PEERS):
            raise SystemExit(
                f"peer {name!r}: expected one of {', '.join(p.name for p in PEERS)}, or how one begins"
            )
    return [
        Dense(),
        *ours,
        *(peer for peer in PEERS if any(peer.name.startswith(name) for name in wanted)),
    ]


def started(threads: int | None, build: Callable[..., object], *shared: Any) -> object:
    """Build a job, on so many threads."""
    import warnings

    warnings.filterwarnings("ignore")  # of libraries, about themselves
    if threads is not None:
        torch.set_num_threads(threads)
    return build(*shared)


def environment(threads: int | None) -> dict[str, Any]:
    """What a reader must know to believe a number: the CPU, the threads, the versions, and how busy the machine was at the start."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads or torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    load = (
        "" if environment["load"] is None else f", load {environment['load'][0]:.1f} at the start"
    )
    return (f"{environment['cpu']}, {environment['cores']} cores, {environment['instructions']}, {environment['threads']} threads{load}; "
            f"{versions}")  # fmt: skip


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, in columns that line up."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def pivot(
    results: Iterable[Result], column: Callable[[Result], str], cell: Callable[[Result], str]
) -> str:
    """A table of one row a method and one column a case."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for result in results:
        head = column(result)
        columns[head] = None
        cells.setdefault(result["method"], {})[head] = cell(result)
    return markdown(
        ["", *columns], [[m, *(row.get(head, "–") for head in columns)] for m, row in cells.items()]
    )


def ratio_cell(result: Result, unit: float = 1000.0, digits: int = 2, name: str = "ms") -> str:
    """``0.53 (0.51) · 0.79 ms``: the ratio, that of low percentiles, and the median."""
    time_ = f"{unit * result['seconds']:.{digits}f} {name}"
    if "ratio" not in result:
        return time_
    return f"{result['ratio']:.2f} ({result['low_ratio']:.2f}) · {time_}"


Bars = Sequence[tuple[str, float]]
"""Labels and lengths."""


def plot(file: Path, title: str, panels: Mapping[str, Bars]) -> None:
    """Bars, a panel a case, with a line at 1 where the dense method is. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    tallest = max(len(bars) for bars in panels.values())
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down,
        across,
        figsize=(5.5 * across, (1 + 0.26 * tallest) * down),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, bars) in zip(axes.flat, panels.items(), strict=False):
        labels, lengths = [label for label, _ in bars], [length for _, length in bars]
        places = range(len(bars))
        ax.barh(
            places, lengths, color=["#888888" if label == BASE else "#4477aa" for label in labels]
        )
        ax.set_yticks(places, labels, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(1.0, color="#333333", linewidth=0.8)
        for place, length in zip(places, lengths, strict=True):
            ax.annotate(f" {length:.2f}", (length, place), va="center", fontsize=7)
        ax.margins(x=0.15)  # room for the numbers
        if max(lengths) > 20 * min(lengths):
            ax.set_xscale("log")
        ax.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file)
    pyplot.close(figure)
