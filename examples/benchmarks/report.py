"""Flags, the choice of methods, and the output of every benchmark: tables, a picture, JSON.

Results are dicts of plain values: ``method``, ``dtype``, the case, ``seconds`` and others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from methods import BASE, Dense, Method, Packed, promised
from modulora_conformance.bench.timing import device_name
from peers import PEERS
from turns import Build, Here, Job, Key, NotMeasuredError, Process, Turns, take_turns

Result = dict[str, Any]

Panels = Mapping[str, Sequence[tuple[str, float]]]
"""Bars by the title of their panel: labels and lengths."""

LIBRARIES = (
    "torch", "transformers", "numba", "modulora-core", "bitsandbytes", "hqq", "optimum-quanto",
    "torchao", "gptqmodel", "peft", "llama-cpp-python",
)  # fmt: skip


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    names = ", ".join(peer.name for peer in PEERS)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    add = parser.add_argument
    add("-q", "--quantizers", nargs="*", metavar="NAME[:OPTION=VALUE,...]",
        help="our quantizers; by default all installed ones, as they promise")  # fmt: skip
    add("-p", "--peers", nargs="*", metavar="NAME",
        help=f"names or beginnings of names; by default all of {names}")  # fmt: skip
    add("--repeats", type=int, help="turns of each method")
    add("--limit", type=float, default=60.0, help="seconds; a slower method takes no more turns")
    add("--threads", type=int, help="threads of every process")
    add("--quick", action="store_true", help="a short trial")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--plot", type=Path, metavar="FILE", help=".svg, .png or .pdf; needs matplotlib")
    add("--verbose", action="store_true", help="show the output of the processes")
    add("--one-process", action="store_true", help="for a debugger")
    return parser


class Run:
    """One run of a benchmark.

    Attributes:
        methods: the methods that can take part, by name.
        results, not_measured: the output.
    """

    def __init__(self, benchmark: str, flags: argparse.Namespace) -> None:
        self.benchmark, self.flags = benchmark, flags
        self.environment = environment(flags.threads)
        self.methods: dict[str, Method] = {}
        self.results: list[Result] = []
        self.not_measured: list[dict[str, str]] = []
        for method in chosen(flags):
            if benchmark not in method.benchmarks:
                if method.name in (flags.peers or ()):
                    self.skip(method.name, f"it takes no part in {benchmark}.py")
            elif (lacking := method.missing()) is not None:
                self.skip(method.name, lacking)
            else:
                self.methods[method.name] = method

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def skip(self, method: str, why: str, case: str = "") -> None:
        """Note that a method, or a case of it, is not measured."""
        self.not_measured.append({"method": method, "case": case, "reason": why})
        self.say(f"{', '.join(filter(None, (method, case)))}: not measured: {why}")

    def job(self, build: Build, *shared: Any) -> Job:
        words = (started, self.flags.threads, build, *shared)
        if self.flags.one_process:
            return Here(*words)
        return Process(*words, verbose=self.flags.verbose)

    def once(self, build: Build, shared: Sequence[Any], name: str, *arguments: Any) -> Any:
        """The answer of one call in a process that ends."""
        job = self.job(build, *shared)
        try:
            return job.ask(name, *arguments)
        finally:
            job.end()

    def start(self, build: Build, dtypes: Sequence[str], *shared: Any) -> Iterator[tuple[Key, Job]]:
        """A job ``build(method, dtype, *shared)`` for each method and dtype, if it can start."""
        for dtype in dtypes:
            for name, method in self.methods.items():
                self.say(f"starting {name}, {dtype}")
                try:
                    yield (name, dtype), self.job(build, method, dtype, *shared)
                except NotMeasuredError as error:
                    self.skip(name, str(error), dtype)

    def take_turns(self, jobs: Mapping[Key, Job], *arguments: Any) -> Turns:
        """Measure the jobs in turns, and note the failures."""
        asked = {key: (job, arguments) for key, job in jobs.items()}
        turns = take_turns(asked, self.flags.repeats, self.flags.limit)
        for (name, dtype), why in turns.failed.items():
            self.skip(name, why, ", ".join(map(str, (*arguments, dtype))))
        return turns

    def finish(self, tables: Iterable[tuple[str, str]], panels: Panels) -> int:
        """Print titles and tables, and write the files that were asked for.

        Returns:
            the exit code: 1 if nothing was measured.
        """
        print(f"{self.benchmark}: {describe(self.environment)}")
        for title, text in tables:
            print(f"\n{title}\n\n{text}")
        reasons: dict[str, dict[str, None]] = {}
        for line in self.not_measured:
            subject = ", ".join(filter(None, (line["method"], line["case"])))
            reasons.setdefault(line["reason"], {})[subject] = None
        for why, subjects in reasons.items():
            print(f"\n{'; '.join(subjects)}: not measured: {why}")
        if self.flags.json is not None:
            self.flags.json.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        if self.flags.plot is not None:
            plot(self.flags.plot, f"{self.benchmark}: {self.environment['cpu']}", panels)
        return 0 if self.results else 1

    def to_json(self) -> dict[str, Any]:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.flags).items()
        }
        return {"benchmark": self.benchmark, "environment": self.environment,
                "settings": settings, "results": self.results,
                "not_measured": self.not_measured}  # fmt: skip


def chosen(flags: argparse.Namespace) -> list[Method]:
    """The dense method, ours and the peers. Ends the program at an unknown peer."""
    words = promised() if flags.quantizers is None else flags.quantizers
    ours = [Packed(each) for each in words]
    head = getattr(flags, "quantize_head", None)
    ours += [Packed(each, head) for each in words if head is not None]
    wanted = [peer.name for peer in PEERS] if flags.peers is None else flags.peers
    for name in wanted:
        if not any(peer.name.startswith(name) for peer in PEERS):
            known = ", ".join(peer.name for peer in PEERS)
            raise SystemExit(f"peer {name!r}: expected one of {known}, or a beginning, got neither")
    return [Dense(), *ours, *(peer for peer in PEERS if peer.name.startswith(tuple(wanted)))]


def started(threads: int | None, build: Build, *shared: Any) -> object:
    """Build a job with this number of threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    return build(*shared)


def environment(threads: int | None) -> dict[str, Any]:
    """The facts that results depend on: CPU, threads, versions, and load at the start."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads or torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    load = "" if facts["load"] is None else f", load {facts['load'][0]:.1f} at the start"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['instructions']}, "
        f"{facts['threads']} threads{load}; {versions}"
    )


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of aligned columns."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def pivot(cells: Iterable[tuple[str, str, str]]) -> str:
    """A table of ``(method, column, text)``, a row for each method."""
    rows: dict[str, dict[str, str]] = {}
    for method, column, text in cells:
        rows.setdefault(method, {})[column] = text
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = [[method, *(row.get(each, "–") for each in columns)] for method, row in rows.items()]
    return markdown(["", *columns], table)


def mib(result: Result, name: str) -> str:
    """``"870"``: a number of bytes in MiB."""
    return f"{result[f'{name}_bytes'] / 2**20:.0f}"


def ratio_cell(result: Result, unit: float, name: str) -> str:
    """``0.53 (0.51) · 0.79 ms``: the ratio, the ratio of low percentiles, and the median."""
    seconds = f"{unit * result['seconds']:.2f} {name}"
    if "ratio" not in result:
        return seconds
    return f"{result['ratio']:.2f} ({result['low_ratio']:.2f}) · {seconds}"


def plot(file: Path, title: str, panels: Panels) -> None:
    """Draw bars, with a line at 1 for the dense method. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = {name: bars for name, bars in panels.items() if bars}
    if not panels:
        return
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    height = 1 + 0.26 * max(map(len, panels.values()))
    figure = Figure(figsize=(5.5 * across, height * down), layout="constrained")
    for i, (name, bars) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(down, across, i)
        labels, lengths = zip(*bars, strict=True)
        colors = ["#888888" if label == BASE else "#4477aa" for label in labels]
        drawn = ax.barh(range(len(bars)), lengths, color=colors)
        ax.bar_label(drawn, fmt=" %.2f" if max(lengths) < 100 else " %.0f", fontsize=7)
        ax.set_yticks(range(len(bars)), labels, fontsize=8)
        ax.invert_yaxis()
        if dict(bars).get(BASE) == 1.0:  # ratios
            ax.axvline(1.0, color="#333333", linewidth=0.8)
        ax.margins(x=0.15)  # room for the numbers
        if max(lengths) > 20 * min(lengths):
            ax.set_xscale("log")
        ax.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text: a smaller file
        figure.savefig(file)
