"""What a permutation of the columns costs (act-order without static groups): tiles, and products of one row, beside dense ones.

    python plugins/optq/benchmarks/permuted.py [--size 2048] [--group-size 64] [--seconds 1]

``modulora bench optq`` on weights whose codes, scales, zeros and permutation are random: what they are makes no difference to the time. A
tile is beside a copy of a dense fp32 weight, a product beside the dense fp32 one; the two take turns.
"""

from __future__ import annotations

import argparse
import sys

import torch
from modulora_conformance.bench.quantizer_bench import BenchConfig, measure_quantizer
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution
from modulora_optq.reference import Solution

from modulora_core.errors import RequestError
from modulora_core.options import validate_model
from modulora_core.spec import PackedWeight

BITS = (2, 3, 4, 8)


def random_weight(size: int, options: Options, permuted: bool) -> PackedWeight:
    groups = size, options.groups(size)
    codes, zeros = (
        torch.randint(0, options.levels + 1, shape, dtype=torch.uint8)
        for shape in ((size, size), groups)
    )
    permutation = torch.randperm(size, dtype=torch.int32) if permuted else None
    return from_solution(
        Solution(codes, (torch.rand(groups) + 1).half(), zeros, permutation), options
    )


def measure(flags: argparse.Namespace) -> None:
    """Raises RequestError for options that can't be."""
    shape = flags.size, flags.size
    config = BenchConfig(shape=shape, rows=(1,), dtypes=("float32",), seconds=flags.seconds)
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{flags.size} x {flags.size}, groups of {flags.group_size}, {threads}")
    for bits in BITS:
        options = validate_model("optq", Options, {"bits": bits, "group_size": flags.group_size})
        quantizer = OPTQ(options)
        for permuted in (False, True):
            packed = random_weight(flags.size, options, permuted)
            for row in measure_quantizer(quantizer, config, packed=packed).comparisons:
                if row.kind != "lora_step":
                    name = f"{bits} bits{', permuted' if permuted else ''}, {row.kind}"
                    print(
                        f"{name:<32} {1e3 * row.ours.seconds:8.3f} ms, {row.ratio:.2f} x dense",
                        flush=True,
                    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what permuted columns cost on this CPU.")
    parser.add_argument("--size", type=int, default=2048, help="out_features and in_features")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    try:
        measure(parser.parse_args())
    except RequestError as error:
        print(f"permuted: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
