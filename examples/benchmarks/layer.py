"""One linear layer, forward and backward to its input: packed against dense, in turn, medians and ratios.

python examples/benchmarks/layer.py -q nf4 int8
python examples/benchmarks/layer.py -q quip-sharp-e8 optq:bits=3 --forward

An option follows the name after a colon, several with commas between them. What is calibrated gets the identity for H: values
make no difference to the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from modulora_core import registry
from modulora_core.autograd import lora_linear
from modulora_core.options import parse_options
from modulora_core.spec import Calibration
from modulora_core.tiles import tile_budget, tile_bytes


def step(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, backward: bool) -> float:
    """Seconds of a forward and a backward to the input."""
    x = x.detach().requires_grad_(backward)
    started = time.perf_counter()
    y = layer(x)
    if backward:
        y.backward(torch.ones_like(y))
    return time.perf_counter() - started


def packed_layer(name: str, W: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    name, _, options = name.partition(":")
    quantizer = registry.create(name, parse_options(options.split(",") if options else []))
    seen = None if quantizer.spec.calibration == "none" else Calibration(torch.eye(W.shape[1]), 1)
    packed = quantizer.pack(W, seen)
    return lambda x: lora_linear(x, quantizer, packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-q", "--quantizers", nargs="+", required=True)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument(
        "--tiles",
        type=int,
        nargs="+",
        default=[],
        metavar="KIB",
        help="tile budgets to try, besides the default",
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--forward", action="store_true", help="the forward alone")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    W = torch.randn(arguments.size, arguments.size)
    W16 = W.to(torch.bfloat16)
    what = "forward" if arguments.forward else "forward + backward to the input"
    print(f"{arguments.size} x {arguments.size}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"milliseconds {what}, and the ratio to dense fp32 in the same turns")  # fmt: skip
    for rows in arguments.rows:
        layers: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.dtype, int | None]] = {
            "dense fp32": (lambda x: x @ W.t(), torch.float32, None),
            "dense bf16": (lambda x: x @ W16.t(), torch.bfloat16, None),
        }
        for name in arguments.quantizers:
            multiply = packed_layer(name, W)
            layers[f"{name} fp32"] = (multiply, torch.float32, None)
            layers[f"{name} bf16"] = (multiply, torch.bfloat16, None)
            for kib in arguments.tiles:
                layers[f"{name} fp32, tiles of {kib} KiB"] = (multiply, torch.float32, kib * 1024)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(arguments.repeats + 2):
            for name, (layer, dtype, budget) in layers.items():
                x = torch.randn(rows, arguments.size).to(dtype)
                with tile_budget(budget or tile_bytes(x.device)):
                    taken = step(layer, x, not arguments.forward)
                if turn >= 2:  # the first turns compile and warm up
                    seconds[name].append(taken)
        dense = statistics.median(seconds["dense fp32"])
        for name, taken in seconds.items():
            ratios = [a / b for a, b in zip(taken, seconds["dense fp32"], strict=True)]
            print(
                f"{rows:4d} rows  {name:32s} {1000 * statistics.median(taken):8.2f} ms   {statistics.median(ratios):5.2f} x"
            )
        assert dense > 0


if __name__ == "__main__":
    main()
