"""Times greedy decoding with a whole model: ours, dense, and other libraries, in turns.

    python examples/benchmarks/decoding.py
    python examples/benchmarks/decoding.py -q nf4 optq:bits=3 --peers bitsandbytes llama

A turn is the answer to one prompt, prompt included. transformers' ``generate`` decodes for every
method but llama.cpp. Each method has a process of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from methods import BASE, BASE_DTYPE, Method, ModelFiles
from models import DTYPES, ModelJob, measure_models, model_flags
from report import Result, Run, arguments, markdown, mib

from modulora_core.checkpoints.peak_memory import PeakMemory


class DecodingJob(ModelJob):
    """A model that answers ``prompt`` tokens with ``length`` tokens."""

    def __init__(
        self, method: Method, dtype: str, files: ModelFiles, prompt: int, length: int
    ) -> None:
        super().__init__(method, dtype, files)
        self._prompt, self._length, self._peak = self.batch(0, 1, prompt), length, 0

    def prepare(self) -> dict[str, Any]:
        _, facts = self.turn()
        return {**facts, **self.loaded}

    def turn(self) -> tuple[float, dict[str, Any]]:
        with PeakMemory() as peak, torch.inference_mode():
            started = time.perf_counter()
            ids = self.method.decode(self.model, self._prompt, self._length).tolist()
            seconds = time.perf_counter() - started
        self._peak = max(self._peak, peak.nbytes)
        return seconds, {"new_tokens": len(ids), "ids": ids, "peak_memory_bytes": self._peak}


def rate(result: Result) -> str:
    """``23.1 · 1.38 (1.40) ×``: tokens a second, and multiples of the dense model's."""
    tokens = f"{result['new_tokens'] / result['seconds']:.1f}"
    if "ratio" not in result:
        return tokens
    return f"{tokens} · {1 / result['ratio']:.2f} ({1 / result['low_ratio']:.2f}) ×"


def panels(run: Run) -> dict[str, list[tuple[str, float]]]:
    bars: dict[str, list[tuple[str, float]]] = {}
    for r in run.results:
        if "ratio" in r:
            bars.setdefault(f"rate, {r['dtype']}", []).append((r["method"], 1 / r["ratio"]))
    return bars


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (16)")
    parser.add_argument("--length", type=int, help="tokens to decode (48)")
    flags = parser.parse_args(words)
    length = flags.length or (8 if flags.quick else 48)
    flags.repeats = flags.repeats or (2 if flags.quick else 7)
    run = Run("decoding", flags)
    measure_models(run, DecodingJob, flags.dtypes or list(DTYPES), flags.prompt, length)
    title = (
        f"{flags.model}, {length} tokens after {flags.prompt}: "
        f"tokens/s · × {BASE} {BASE_DTYPE} (by low percentiles)"
    )
    rows = [[r["method"], r["dtype"], rate(r), mib(r, "loading"), mib(r, "peak_memory")]
            for r in run.results]  # fmt: skip
    heads = ["", "dtype", "tokens/s", "loading, MiB", "peak MiB"]
    return run.finish([(title, markdown(heads, rows))], panels(run))


if __name__ == "__main__":
    sys.exit(main())
