"""One linear layer: packed against dense and against other libraries, in turn, medians and ratios.

    python examples/benchmarks/layer.py
    python examples/benchmarks/layer.py -q nf4 int8 --peers bitsandbytes --rows 1 16 512
    python examples/benchmarks/layer.py -q quip-sharp-e8 optq:bits=3 --peers --forward

Without --forward, both the forward alone and the forward with the backward to the input are measured. A cell is the ratio to the dense
layer with fp32 inputs in the same turns, in parentheses that of the tenth percentiles, and the median. Each method rotates over as many
copies of its layer as take twice the last cache, so that weights come from memory. An option follows a quantizer's name after a colon,
several with commas between them. What is calibrated gets the identity for H: values make no difference to the time.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from methods import BASE, BASE_DTYPE, Method
from modulora_conformance.bench.timing import cold_copies
from report import Bars, Result, Run, arguments, pivot, ratio_cell
from torch import Tensor, nn
from turns import NotMeasuredError, take_turns

FORWARD, BOTH = "forward", "forward + backward"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """What is done, with how many rows of inputs of which dtype."""

    passes: str
    rows: int
    dtype: str

    @property
    def training(self) -> bool:
        return self.passes == BOTH


class LayerJob:
    """A method's layers, and a case's inputs. ``seconds``: how long a turn repeats its call at least."""

    def __init__(self, method: Method, shape: tuple[int, int], seconds: float) -> None:
        self._method, self._seconds = method, seconds
        self._weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        self._layers: dict[tuple[str, str], Iterator[nn.Module]] = {}

    def prepare(self, case: Case) -> dict[str, Any]:
        """Make the layers and run them once, against the dense product: what computes something else isn't measured."""
        told: dict[str, Any] = {}
        copies = 1
        if (case.passes, case.dtype) not in self._layers:
            told = self._make(case)
            copies = told["copies"]
        x, dY = self._inputs(case)
        with self._method.running(training=case.training):
            for _ in range(copies):  # the first call of a layer may compile, or repack its weight
                y, dX = self._call(case, x, dY)
        error = relative(y, x.float() @ self._weight.t())
        if dX is not None:
            error = max(error, relative(dX, dY.float() @ self._weight))
        if not error < 1.0:
            raise NotMeasuredError(f"its result is off by {error:.2f} of the dense product's norm")
        return {**told, "relative_error": error}

    def _make(self, case: Case) -> dict[str, Any]:
        self._layers = {
            key: layers for key, layers in self._layers.items() if key[0] == case.passes
        }
        first = self._method.layer(self._weight, getattr(torch, case.dtype), training=case.training)
        size = nbytes(first)
        copies = self._method.copies(
            first, self._weight, getattr(torch, case.dtype), training=case.training
        )
        layers = [first, *itertools.islice(copies, cold_copies(size) - 1)]
        self._layers[case.passes, case.dtype] = itertools.cycle(layers)
        return {"bytes": size, "copies": len(layers)}

    def _inputs(self, case: Case) -> tuple[Tensor, Tensor]:
        out_features, in_features = self._weight.shape
        generator = torch.Generator().manual_seed(case.rows)
        x = torch.randn(case.rows, in_features, generator=generator)
        dY = torch.randn(case.rows, out_features, generator=generator)
        return x.to(getattr(torch, case.dtype)), dY.to(getattr(torch, case.dtype))

    def turn(self, case: Case) -> tuple[float, dict[str, Any]]:
        """The median seconds of a call, repeated as long as a turn lasts, after one that wakes the threads up."""
        x, dY = self._inputs(case)
        taken: list[float] = []
        with self._method.running(training=case.training):
            self._call(case, x, dY)
            end = time.perf_counter() + self._seconds
            while not taken or time.perf_counter() < end:
                started = time.perf_counter()
                self._call(case, x, dY)
                taken.append(time.perf_counter() - started)
        return statistics.median(taken), {}

    def _call(self, case: Case, x: Tensor, dY: Tensor) -> tuple[Tensor, Tensor | None]:
        """Y, and dX where there is a backward, by the next of the layers."""
        layer = next(self._layers[case.passes, case.dtype])
        if not case.training:
            with torch.no_grad():
                return layer(x), None
        x = x.detach().requires_grad_()
        y = layer(x)
        y.backward(dY)
        return y.detach(), x.grad


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def nbytes(layer: nn.Module) -> int:
    """Bytes of a layer's tensors, those inside of tensor subclasses and of attributes included."""
    seen: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                for name in value.__tensor_flatten__()[0]:
                    add(getattr(value, name))
            elif value.device.type != "meta":
                seen[value.data_ptr()] = value.nbytes
            for name in ("quant_state", "SCB"):  # where bitsandbytes keeps scales
                add(getattr(value, name, None))
        elif isinstance(value, dict):
            for part in value.values():
                add(part)
        elif type(value).__name__ == "QuantState":
            add(vars(value))

    for module in layer.modules():
        add({**vars(module)["_parameters"], **vars(module)["_buffers"]})
        add({name: part for name, part in vars(module).items() if not name.startswith("_")})
    return sum(seen.values())


def measure(run: Run, shape: tuple[int, int], seconds: float, dtypes: Sequence[str]) -> None:
    jobs = run.start(LayerJob, shape, seconds)
    passes = (FORWARD,) if run.flags.forward else (FORWARD, BOTH)
    for which, rows in itertools.product(passes, run.flags.rows):
        run.say(f"{which}, {rows} rows")
        asked = {
            (name, dtype): (job, (Case(which, rows, dtype),))
            for name, job in jobs.items()
            for dtype in dtypes
        }
        turns = take_turns(asked, run.flags.repeats, run.flags.limit)
        run.results += turns.results((BASE, BASE_DTYPE), passes=which, rows=rows)
        for (name, dtype), why in turns.failed.items():
            run.skip(name, why, f"{which}, {rows} rows, {dtype}")
    for job in jobs.values():
        job.end()


def tables(run: Run, shape: tuple[int, int]) -> Iterator[tuple[str, str]]:
    for which, dtype in {(result["passes"], result["dtype"]): None for result in run.results}:
        results = [r for r in run.results if r["passes"] == which and r["dtype"] == dtype]
        title = f"{shape[0]} × {shape[1]}, {which}, {dtype} inputs: × {BASE} {BASE_DTYPE} (of low percentiles) · median"
        yield title, pivot(results, rows_of, ratio_cell)


def rows_of(result: Result) -> str:
    return f"{result['rows']} row{'s' if result['rows'] > 1 else ''}"


def panels(run: Run) -> dict[str, Bars]:
    """A panel a case; lengths are ratios."""
    bars: dict[str, list[tuple[str, float]]] = {}
    for result in run.results:
        if "ratio" in result:
            title = f"{result['passes']}, {rows_of(result)}, {result['dtype']}"
            bars.setdefault(title, []).append((result["method"], result["ratio"]))
    return dict(bars)


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--size", type=int, help="out_features and in_features (2048)")
    add("--shape", metavar="OUTxIN", help="instead of --size")
    add("--rows", type=int, nargs="+", help="rows of the inputs (1 16 512)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the inputs")
    add(
        "--tiles",
        type=int,
        nargs="+",
        default=[],
        metavar="KIB",
        help="tile budgets to try with -q, besides the default",
    )
    add("--forward", action="store_true", help="the forward alone")
    add("--seconds", type=float, help="how long a method's turn lasts, at least (0.03)")
    flags = parser.parse_args(words)
    quick = flags.quick
    shape = shape_of(flags.shape, flags.size or (128 if quick else 2048))
    flags.rows = flags.rows or ([1, 32] if quick else [1, 16, 512])
    flags.repeats = flags.repeats or (3 if quick else 15)
    run = Run("layer", flags)
    measure(run, shape, flags.seconds or (0.001 if quick else 0.03), flags.dtypes)
    return run.finish(tables(run, shape), lambda: panels(run))


def shape_of(text: str | None, size: int) -> tuple[int, int]:
    if text is None:
        return size, size
    out_features, _, in_features = text.lower().partition("x")
    if not (out_features.isdigit() and in_features.isdigit()):
        raise SystemExit(f"--shape: expected OUTxIN, such as 4096x11008, got {text!r}")
    return int(out_features), int(in_features)


if __name__ == "__main__":
    sys.exit(main())
