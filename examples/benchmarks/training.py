"""Times a LoRA training step of a whole model: ours, and dense and other libraries with PEFT.

    python examples/benchmarks/training.py
    python examples/benchmarks/training.py -q nf4 --peers bitsandbytes --dtypes float32 bfloat16
    python examples/benchmarks/training.py -q nf4 --gradient-checkpointing nf4 --keep-products

A step is a forward, a backward and AdamW. Adapters of rank 8 in fp32 are on all linear layers but
the head, without dropout. Gradient checkpointing is off unless it is asked for. Each method has a
process, and they take turns. Peaks are the resident memory of that process, with its libraries,
while it loads the model and during the steps. If a library can't store its quantized model, loading
includes quantizing. The loss is the first step's: near the dense model's, if a method is right.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from methods import BASE, BASE_DTYPE, Method, ModelFiles
from models import ModelJob, measure_models, model_flags
from report import Result, Run, arguments, markdown, mib, ratio_cell

from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.training.gradient_checkpointing import checkpoint_activations


class TrainingJob(ModelJob):
    """A model in training.

    Args:
        shape: segments of a batch, and tokens of a segment.
        checkpointing: the methods that use gradient checkpointing.
        keep_products: keep the products with packed weights, with gradient checkpointing.
        precision: of fp32 products, by torch's name.
    """

    def __init__(
        self,
        method: Method,
        dtype: str,
        files: ModelFiles,
        shape: tuple[int, int],
        checkpointing: Sequence[str],
        keep_products: bool,
        precision: str,
    ) -> None:
        super().__init__(method, dtype, files)
        torch.set_float32_matmul_precision(precision)
        self._shape, self._steps, self._peak = shape, 0, 0
        self.model = method.adapt(self.model, self.targets())
        if method.name in checkpointing:
            checkpoint_activations(self.model, keep_products=keep_products)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._count = sum(parameter.numel() for parameter in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def prepare(self) -> dict[str, Any]:
        _, facts = self.turn()
        return {**facts, **self.loaded, "trained": self._count}

    def turn(self) -> tuple[float, dict[str, Any]]:
        ids = self.batch(self._steps, *self._shape)
        with PeakMemory() as peak:
            started = time.perf_counter()
            loss: Any = self.method.loss(self.model, ids)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
        self._peak = max(self._peak, peak.nbytes)
        first = {"loss": float(loss.detach())} if self._steps == 0 else {}
        self._steps += 1
        return seconds, {"peak_memory_bytes": self._peak, **first}


def table(run: Run, tokens: int) -> str:
    heads = [
        "",
        "dtype",
        f"× {BASE} {BASE_DTYPE} · a step",
        "tokens/s",
        "loading, MiB",
        "peak MiB",
        "loss",
    ]
    rows = [
        [r["method"], r["dtype"], ratio_cell(r, 1.0, "s"), f"{tokens / r['seconds']:.0f}",
         mib(r, "loading"), mib(r, "peak_memory"), f"{r['loss']:.3f}"]
        for r in run.results
    ]  # fmt: skip
    return markdown(heads, rows)


def panels(run: Run) -> dict[str, list[tuple[str, float]]]:
    def bars(key: str, unit: float) -> list[tuple[str, float]]:
        return [(label(r), r[key] / unit) for r in run.results if key in r]

    dense = [r for r in run.results if label(r) == BASE]
    peak = dense[0]["peak_memory_bytes"] if dense else 2**20
    return {"time of a step": bars("ratio", 1.0), "peak memory": bars("peak_memory_bytes", peak)}


def label(result: Result) -> str:
    dtype = "" if result["dtype"] == BASE_DTYPE else f", {result['dtype']}"
    return f"{result['method']}{dtype}"


def checkpointing_methods(run: Run) -> list[str]:
    """The methods that use gradient checkpointing. Ends the program if the flags are wrong."""
    names = run.flags.gradient_checkpointing
    if unknown := set(names or ()) - set(run.methods):
        known = ", ".join(run.methods)
        raise SystemExit(
            f"--gradient-checkpointing: expected some of {known}, got {', '.join(sorted(unknown))}"
        )
    if run.flags.keep_products and names is None:
        raise SystemExit("--keep-products: expected --gradient-checkpointing too, got none")
    return list(run.methods) if names == [] else names or []


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=2, help="segments of a batch (2)")
    add("--seq-len", type=int, help="tokens of a segment (256)")
    add("--gradient-checkpointing", nargs="*", metavar="METHOD",
        help="recompute activations: of all methods, or of these")  # fmt: skip
    add("--keep-products", action="store_true",
        help="with gradient checkpointing: keep products with packed weights")  # fmt: skip
    add("--matmul-precision", choices=("highest", "high", "medium"), default="highest",
        help="of fp32 products of all methods")  # fmt: skip
    flags = parser.parse_args(words)
    flags.repeats = flags.repeats or (2 if flags.quick else 7)
    run = Run("training", flags)
    batch, length = flags.batch_size, flags.seq_len or (32 if flags.quick else 256)
    measure_models(
        run, TrainingJob, flags.dtypes or [BASE_DTYPE], (batch, length),
        checkpointing_methods(run), flags.keep_products, flags.matmul_precision,
    )  # fmt: skip
    title = f"{flags.model}, {batch} × {length} tokens"
    return run.finish([(title, table(run, batch * length))], panels(run))


if __name__ == "__main__":
    sys.exit(main())
