"""Time the ways to multiply by a packed weight beside the dense product, in turns on one thread.

    python examples/benchmarks/ways.py nf4 --rows 128 512 --shapes 4096x4096
    python examples/benchmarks/ways.py nf4 --rows 64 --dtype bfloat16
    python examples/benchmarks/ways.py nf4 optq:bits=3 --rows 1

Prints, for each shape, the best times of forward and transposed product together, in milliseconds
of the processor. It counts CPU time, which load on the machine disturbs least. A copy of the weight
is read at each turn, so that it comes from memory.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import time
from collections.abc import Iterator
from typing import cast

import torch
from modulora_kernels.cpu import choices
from modulora_kernels.kernel_quantizer import KernelQuantizer
from torch import Tensor

from modulora_core.registry import Choice
from modulora_core.spec import Calibration, PackedWeight, Quantizer

FP32, BF16 = torch.float32, torch.bfloat16
WAYS = {"tiles": None, "few rows": FP32, "few rows, bf16": BF16}
"""The dtype of products of few rows. A plugin may have a kernel for one row."""

COPIED_BYTES = 64 * 2**20


def ways_of(rows: int, dtype: torch.dtype) -> Iterator[str]:
    """The ways that this processor and these rows can go."""
    yield "tiles"
    if rows == 1:
        yield "one row"
    if rows <= 2 * choices.FEW_ROWS:
        yield "few rows"
        if dtype is BF16:
            yield "few rows, bf16"


def packed_by(quantizer: Quantizer, weight: Tensor) -> list[PackedWeight]:
    """Copies of a packed weight. A calibrated quantizer gets H = I."""
    needs = quantizer.spec.calibration != "none"
    packed = quantizer.pack(weight, Calibration(torch.eye(weight.shape[1]), 1) if needs else None)
    return [copy.deepcopy(packed) for _ in range(max(2, COPIED_BYTES // weight.nbytes))]


def times(
    quantizer: KernelQuantizer, shape: tuple[int, int], rows: int, dtype: torch.dtype, turns: int
) -> dict[str, float]:
    """The best milliseconds of X Ŵᵀ and Y Ŵ together, by way; ``dense`` too. One goes forward."""
    weight = torch.randn(shape) * 0.02
    packed = packed_by(quantizer, weight)
    dense = itertools.cycle([weight.to(dtype, copy=True) for _ in packed])
    copies, best = itertools.cycle(packed), dict[str, float]()
    loops = importlib.import_module(f"{quantizer.kernels}.cpu").kernels
    one_row = loops._one_row
    given = [torch.randn(rows, shape[1 - side]).to(dtype) for side in (0, 1)]
    sides = (0,) if rows == 1 else (0, 1)  # kernels for one row go forward
    for way, side in itertools.product(["dense", *ways_of(rows, dtype)] * turns, sides):
        x, W, own = given[side], next(dense), next(copies)
        inner = WAYS.get(way, FP32)
        choices.dtype_of_few = lambda *_, inner=inner: inner
        loops._one_row = one_row if way == "one row" else lambda _: None
        started = time.process_time()
        if way == "dense":
            x @ (W if side else W.t())
        else:
            quantizer.matmul(x, own, bool(side))
        taken = 1e3 * (time.process_time() - started)
        best[f"{way} {side}"] = min(taken, best.get(f"{way} {side}", taken))
    return {
        way: sum(best[f"{way} {side}"] for side in sides)
        for way in ["dense", *ways_of(rows, dtype)]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quantizers", nargs="+", metavar="NAME[:OPTION=VALUE,...]")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "2048x2048", "4096x4096"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--turns", type=int, default=10)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape, rows in itertools.product(flags.quantizers, flags.shapes, flags.rows):
        out_features, in_features = map(int, shape.split("x"))
        found = times(
            cast("KernelQuantizer", Choice.parse(name).create()), (out_features, in_features), rows,
            getattr(torch, flags.dtype), flags.turns,
        )  # fmt: skip
        cells = "  ".join(
            f"{way} {ms:.2f} ({ms / found['dense']:.2f} ×)" for way, ms in found.items()
        )
        print(f"{name}, {rows} rows, {shape}, {flags.dtype}: {cells}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
