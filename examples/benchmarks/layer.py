"""Times one linear layer: our quantizers and other libraries beside the dense layer, in turns.

    python examples/benchmarks/layer.py
    python examples/benchmarks/layer.py -q nf4 int8 --peers bitsandbytes --rows 1 16 512
    python examples/benchmarks/layer.py -q quip-sharp-e8 optq:bits=3 --peers --forward

It measures the forward alone, and the forward with the gradient of the inputs. A cell shows the
ratio to the dense layer with fp32 inputs in the same turns, the ratio of tenth percentiles, and the
median. Each method rotates over so many copies of its layer that weights come from memory.
"""

from __future__ import annotations

import copy
import itertools
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from methods import BASE, BASE_DTYPE, Method
from models import DTYPES, nbytes
from modulora_conformance.bench.timing import cold_copies
from modulora_conformance.oracle import relative_error
from report import Result, Run, arguments, pivot, ratio_cell
from torch import Tensor, nn
from turns import NotMeasuredError

FORWARD, BOTH = "forward", "forward + backward"

MOST_ERROR = 0.99
"""A result with a larger relative error is wrong: zeros have 1, the wrong sign has 2."""


class LayerJob:
    """A method's layers for inputs of a dtype. A turn lasts at least ``seconds``."""

    def __init__(self, method: Method, dtype: str, shape: tuple[int, int], seconds: float) -> None:
        self._method, self._dtype, self._seconds = method, getattr(torch, dtype), seconds
        self._weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        self._passes, self._layers = "", list[nn.Module]()

    def prepare(self, passes: str, rows: int) -> dict[str, Any]:
        """Make the layers, run each once, and compare the result with the dense product."""
        if passes != self._passes:
            self._layers = []  # before there are others
            self._passes, self._layers = passes, self._make(training=passes == BOTH)
        x, dY = self._inputs(rows)
        for layer in self._layers:  # the first call of a layer may compile, or repack its weight
            y, dX = self._call(layer, x, dY)
        error = relative_error(y, x.float() @ self._weight.t())
        if dX is not None:
            error = max(error, relative_error(dX, dY.float() @ self._weight))
        if not error <= MOST_ERROR:
            raise NotMeasuredError(f"its result is off by {error:.2f} of the dense product's norm")
        return {"relative_error": error, "bytes": nbytes(layer), "copies": len(self._layers)}

    def _make(self, *, training: bool) -> list[nn.Module]:
        def layer() -> nn.Module:
            return self._method.layer(self._weight, self._dtype, training=training)

        first = layer()
        more = cold_copies(nbytes(first)) - 1
        copied = (copy.deepcopy(first) if self._method.copies else layer() for _ in range(more))
        return [first, *copied]

    def _inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """x and dY."""
        out_features, in_features = self._weight.shape
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, in_features, generator=generator)
        return x.to(self._dtype), torch.randn(rows, out_features, generator=generator).to(x.dtype)

    def turn(self, _passes: str, rows: int) -> tuple[float, dict[str, Any]]:
        """The median seconds of a call. A first call wakes the threads."""
        (x, dY), layers, taken = self._inputs(rows), itertools.cycle(self._layers), list[float]()
        self._call(next(layers), x, dY)
        end = time.perf_counter() + self._seconds
        while not taken or time.perf_counter() < end:
            layer, started = next(layers), time.perf_counter()
            self._call(layer, x, dY)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken), {}

    def _call(self, layer: nn.Module, x: Tensor, dY: Tensor) -> tuple[Tensor, Tensor | None]:
        """Y, and dX if there is a backward."""
        if self._passes == FORWARD:
            with torch.no_grad():
                return layer(x), None
        x = x.detach().requires_grad_()
        y = layer(x)
        y.backward(dY)
        return y.detach(), x.grad


def rows_of(result: Result) -> str:
    return f"{result['rows']} row{'s' * (result['rows'] > 1)}"


def tables(run: Run, shape: tuple[int, int]) -> Iterator[tuple[str, str]]:
    for passes, dtype in dict.fromkeys((r["passes"], r["dtype"]) for r in run.results):
        results = [r for r in run.results if (r["passes"], r["dtype"]) == (passes, dtype)]
        title = (
            f"{shape[0]} × {shape[1]}, {passes}, {dtype} inputs: "
            f"× {BASE} {BASE_DTYPE} (of low percentiles) · median"
        )
        cells = ((r["method"], rows_of(r), ratio_cell(r, 1e3, "ms")) for r in results)
        yield title, pivot(cells)


def panels(run: Run) -> dict[str, list[tuple[str, float]]]:
    bars: dict[str, list[tuple[str, float]]] = {}
    for r in run.results:
        if "ratio" in r:
            title = f"{r['passes']}, {rows_of(r)}, {r['dtype']}"
            bars.setdefault(title, []).append((r["method"], r["ratio"]))
    return bars


def shape_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise SystemExit(f"--shape: expected OUTxIN, such as 4096x11008, got {text!r}")
    return int(match[1]), int(match[2])


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--shape", metavar="OUTxIN", help="of the weight (2048x2048)")
    add("--rows", type=int, nargs="+", help="of the inputs (1 16 512)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the inputs")
    add("--forward", action="store_true", help="the forward alone")
    add("--seconds", type=float, help="the least duration of a turn (0.03)")
    flags = parser.parse_args(words)
    quick = flags.quick
    shape = shape_of(flags.shape or ("128x128" if quick else "2048x2048"))
    seconds = flags.seconds or (0.001 if quick else 0.03)
    flags.rows = flags.rows or ([1, 32] if quick else [1, 16, 512])
    flags.repeats = flags.repeats or (3 if quick else 15)
    run = Run("layer", flags)
    jobs = dict(run.start(LayerJob, flags.dtypes, shape, seconds))
    for passes in (FORWARD,) if flags.forward else (FORWARD, BOTH):
        for rows in flags.rows:
            run.say(f"{passes}, rows: {rows}")
            turns = run.take_turns(jobs, passes, rows)
            run.results += turns.results((BASE, BASE_DTYPE), passes=passes, rows=rows)
    for job in jobs.values():
        job.end()
    return run.finish(tables(run, shape), panels(run))


if __name__ == "__main__":
    sys.exit(main())
