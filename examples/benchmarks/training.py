"""A LoRA training step of a whole model: ours, dense with PEFT, and other libraries with PEFT, in turn.

    python examples/benchmarks/training.py
    python examples/benchmarks/training.py -q nf4 quip-sharp-e8:bits=2 --peers bitsandbytes --repeats 5

    python examples/benchmarks/training.py -q nf4 --peers bitsandbytes --dtypes float32 bfloat16 --gradient-checkpointing nf4
    python examples/benchmarks/training.py -q nf4 --gradient-checkpointing nf4 --keep-products rounded
    python examples/benchmarks/training.py -q nf4 --matmul-precision high

A step is a forward, a backward and AdamW on a batch, without gradient checkpointing unless asked: adapters of rank 8 in fp32 on all linear
layers but the head, no dropout. Each method has a process of its own and they take turns. Peak is the resident set of that process
during the steps. The loss is that of the first step: near the dense model's where a method does what it should.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from methods import BASE, BASE_DTYPE, Method, ModelFiles
from models import ModelJob, model_files, model_flags, prepare_methods, settle, start_models
from modulora_core.kept_products import Form
from report import Bars, Result, Run, arguments, markdown, ratio_cell
from turns import take_turns

from modulora_core.devices.memory import PeakMemory


class TrainingJob(ModelJob):
    """A model in training. ``rows`` segments of ``length`` tokens make a batch."""

    def __init__(
        self,
        method: Method,
        files: ModelFiles,
        dtype: str,
        rows: int,
        length: int,
        checkpointing: Sequence[str],
        products: Form,
        precision: str = "highest",
    ) -> None:
        super().__init__(method, files, dtype)
        torch.set_float32_matmul_precision(precision)
        self._rows, self._length, self._steps, self._peak = rows, length, 0, 0
        self.model = method.adapt(self.model, self.targets())
        if method.name in checkpointing:
            from modulora_core.training.gradient_checkpointing import checkpoint_activations

            checkpoint_activations(self.model, products=products)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._count = sum(parameter.numel() for parameter in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def prepare(self) -> dict[str, Any]:
        _, told = self.turn()
        return {**told, **self.loaded, "trained": self._count}

    def turn(self) -> tuple[float, dict[str, Any]]:
        ids = self.batch(self._steps, self._rows, self._length)
        with PeakMemory() as peak, self.method.running(training=True):
            started = time.perf_counter()
            loss = self.method.loss(self.model, ids)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
        self._peak = max(self._peak, peak.nbytes)
        first = {"loss": float(loss.detach())} if self._steps == 0 else {}
        self._steps += 1
        return seconds, {"peak_memory_bytes": self._peak, **first}


def table(run: Run) -> str:
    tokens = run.flags.batch_size * run.flags.seq_len
    heads = ["", "dtype", f"× {BASE} {BASE_DTYPE} · a step", "tokens/s", "peak MiB", "loss"]
    rows = [
        [r["method"], r["dtype"], ratio_cell(r, 1.0, 2, "s"), f"{tokens / r['seconds']:.0f}",
         f"{r['peak_memory_bytes'] / 2**20:.0f}", f"{r['loss']:.3f}"]
        for r in run.results
    ]  # fmt: skip
    return markdown(heads, rows)


def panels(run: Run) -> dict[str, Bars]:
    def name(result: Result) -> str:
        return (
            str(result["method"])
            if result["dtype"] == BASE_DTYPE
            else f"{result['method']}, {result['dtype']}"
        )

    measured = [result for result in run.results if "ratio" in result]
    base = next((r for r in measured if (r["method"], r["dtype"]) == (BASE, BASE_DTYPE)), None)
    panels = {"time of a step": [(name(result), result["ratio"]) for result in measured]}
    if base is not None:
        peak = base["peak_memory_bytes"]
        panels["peak memory"] = [
            (name(result), result["peak_memory_bytes"] / peak) for result in measured
        ]
    return dict(panels)


def checkpointing_flag(parser: argparse.ArgumentParser) -> None:
    """``--gradient-checkpointing``, of all methods or of some, and what it keeps."""
    parser.add_argument(
        "--gradient-checkpointing", nargs="*", metavar="METHOD",
        help="keep a block's inputs only, and run it again; with names, only these methods do",
    )  # fmt: skip
    parser.add_argument(
        "--keep-products", choices=("none", "exact", "rounded"), default="none",
        help="of ours with gradient checkpointing: keep products with packed weights too",
    )  # fmt: skip


def checkpointing_methods(run: Run) -> list[str]:
    """The methods that keep a block's inputs only. Ends the program where a name is none of them."""
    named = run.flags.gradient_checkpointing
    if unknown := set(named or ()) - set(run.methods):
        raise SystemExit(
            f"--gradient-checkpointing {unknown.pop()!r}: expected one of {', '.join(run.methods)}"
        )
    return list(run.methods) if named == [] else named or []


def kept_products(run: Run) -> Form:
    """Ends the program where nothing would be kept."""
    form: Form = run.flags.keep_products
    if form != "none" and run.flags.gradient_checkpointing is None:
        raise SystemExit("--keep-products: expected --gradient-checkpointing beside it, got none")
    return form


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=2, help="segments of a batch (2)")
    add("--seq-len", type=int, help="tokens of a segment (256)")
    checkpointing_flag(parser)
    add("--matmul-precision", choices=("highest", "high", "medium"), default="highest",
        help="of products in fp32, of all methods, as torch.set_float32_matmul_precision takes it (highest)")  # fmt: skip
    flags = parser.parse_args(words)
    flags.seq_len = flags.seq_len or (32 if flags.quick else 256)
    flags.repeats = flags.repeats or (2 if flags.quick else 7)
    run = Run("training", flags)
    products = kept_products(run)
    with model_files(run) as files:
        prepare_methods(run, files)
        checkpointing = checkpointing_methods(run)
        rest = (flags.batch_size, flags.seq_len, checkpointing, products, flags.matmul_precision)
        jobs = start_models(run, TrainingJob, files, flags.dtypes or [BASE_DTYPE], *rest)
        turns = take_turns(
            {key: (job, ()) for key, job in jobs.items()}, flags.repeats, flags.limit
        )
        settle(jobs)
    run.results += turns.results((BASE, BASE_DTYPE))
    for (name, dtype), why in turns.failed.items():
        run.skip(name, why, dtype)
    title = f"{flags.model}, {flags.batch_size} × {flags.seq_len} tokens"
    return run.finish([(title, table(run))], lambda: panels(run))


if __name__ == "__main__":
    sys.exit(main())
