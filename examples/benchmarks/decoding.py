"""Greedy decoding by a whole model: ours, dense, and other libraries, in turn.

    python examples/benchmarks/decoding.py
    python examples/benchmarks/decoding.py -q nf4 optq:bits=3 --peers bitsandbytes hqq llama --dtypes float32

A turn is the answer to one prompt, which counts: its tokens go through the model at once, the others one by one. transformers' `generate`
decodes for all but llama.cpp. Each method has a process of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from methods import BASE, BASE_DTYPE, Method, ModelFiles
from models import DTYPES, ModelJob, model_files, model_flags, prepare_methods, settle, start_models
from report import Bars, Result, Run, arguments, pivot
from turns import take_turns

from modulora_core.devices.memory import PeakMemory


class DecodingJob(ModelJob):
    """A model that answers ``prompt`` tokens with ``length``."""

    def __init__(
        self, method: Method, files: ModelFiles, dtype: str, prompt: int, length: int
    ) -> None:
        super().__init__(method, files, dtype)
        self._prompt, self._length, self._peak = self.batch(0, 1, prompt), length, 0

    def prepare(self) -> dict[str, Any]:
        _, told = self.turn()
        return {**told, **self.loaded}

    def turn(self) -> tuple[float, dict[str, Any]]:
        with PeakMemory() as peak, torch.inference_mode(), self.method.running(training=False):
            started = time.perf_counter()
            tokens = self.method.decode(self.model, self._prompt, self._length)
            seconds = time.perf_counter() - started
        self._peak = max(self._peak, peak.nbytes)
        return seconds, {
            "new_tokens": len(tokens),
            "ids": tokens.tolist(),
            "peak_memory_bytes": self._peak,
        }


def cell(result: Result) -> str:
    """``23.1 tokens/s · 1.38 ×``: the rate by the median, and as a multiple of the dense model's in the same turns."""
    rate = f"{result['new_tokens'] / result['seconds']:.1f}"
    return (
        f"{rate} · {1 / result['ratio']:.2f} ({1 / result['low_ratio']:.2f}) ×"
        if "ratio" in result
        else rate
    )


def panels(run: Run) -> dict[str, Bars]:
    return {
        f"rate, {dtype}": [
            (r["method"], 1 / r["ratio"])
            for r in run.results
            if r["dtype"] == dtype and "ratio" in r
        ]
        for dtype in dict.fromkeys(result["dtype"] for result in run.results)
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    add = parser.add_argument
    add("--prompt", type=int, default=16, help="tokens of the prompt (16)")
    add("--length", type=int, help="tokens to decode (48)")
    flags = parser.parse_args(words)
    flags.length = flags.length or (8 if flags.quick else 48)
    flags.repeats = flags.repeats or (2 if flags.quick else 7)
    run = Run("decoding", flags)
    with model_files(run) as files:
        prepare_methods(run, files)
        dtypes = flags.dtypes or list(DTYPES)
        jobs = start_models(run, DecodingJob, files, dtypes, flags.prompt, flags.length)
        turns = take_turns(
            {key: (job, ()) for key, job in jobs.items()}, flags.repeats, flags.limit
        )
        settle(jobs)
    run.results += turns.results((BASE, BASE_DTYPE))
    for (name, dtype), why in turns.failed.items():
        run.skip(name, why, dtype)
    title = f"{flags.model}, {flags.length} tokens after {flags.prompt}: tokens/s · × {BASE} {BASE_DTYPE} (by low percentiles)"
    return run.finish(
        [(title, pivot(run.results, lambda r: str(r["dtype"]), cell))], lambda: panels(run)
    )


if __name__ == "__main__":
    sys.exit(main())
