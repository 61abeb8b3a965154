"""Measure the optq plugin's kernels on this CPU, beside a copy and a dense fp32 weight, all in one run.

    python plugins/optq/benchmarks/speed.py [--size 2048] [--group-size 64] [--seconds 0.5] [--rows 16 32 64]

A row of the table is the tenth percentile of the repetitions that fit in ``--seconds``: others on the machine only
add time. Each repetition takes the next of several weights, more than the caches hold together, so
that codes and dense weights come from memory, as they do in a model. Codes, scales and zeros are random: what they are
makes no difference to the time. "copy" is ``Tensor.copy_`` of an fp32 weight to another: what it costs to give a dense weight at all.

``--rows`` measures something else instead: products of so many rows, fused and through tiles, which is how
``FEW_ROWS`` was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from modulora_optq import quantizer as module
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution
from modulora_optq.reference import Solution
from torch import Tensor

from modulora_core.spec import PackedWeight
from modulora_core.tiles import tile_bytes, tile_ranges

BYTES = 160 * 2**20  # of dense weights: several times a common L3 cache
BITS = (2, 3, 4, 8)

Row = Callable[[str, Callable[[int], object]], None]


def milliseconds(call: Callable[[int], object], weights: int, seconds: float) -> float:
    """The time of ``call(i)`` in the fastest tenth, ``i`` going around the weights."""
    for i in range(weights):
        call(i)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    for i in itertools.cycle(range(weights)):
        begin = time.perf_counter()
        call(i)
        end = time.perf_counter()
        times.append(1e3 * (end - begin))
        if end > stop:
            return sorted(times)[len(times) // 10]
    raise AssertionError("an endless loop ended")


def random_weight(size: int, options: Options, permuted: bool) -> PackedWeight:
    groups = size, options.groups(size)
    codes, zeros = (
        torch.randint(0, options.levels + 1, shape, dtype=torch.uint8) for shape in ((size, size), groups)
    )
    permutation = torch.randperm(size, dtype=torch.int32) if permuted else None
    return from_solution(Solution(codes, (torch.rand(groups) + 1).half(), zeros, permutation), options)


def all_tiles(quantizer: OPTQ, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Every tile of the budget that the core uses, one after the other."""
    out_features, in_features = packed.shape
    budget = tile_bytes(torch.device("cpu"))
    for rows in tile_ranges(out_features, in_features * dtype.itemsize, budget):
        quantizer.dequantize_tile(packed, rows, dtype)


def kernels_of(options: Options, size: int, count: int, row: Row) -> None:
    """Tiles and products of one row, with columns in their own order and permuted."""
    quantizer, x = OPTQ(options), torch.randn(1, size)
    for permuted in (False, True):
        packed = [random_weight(size, options, permuted) for _ in range(count)]
        name = f"{options.bits} bits{', permuted' if permuted else ''}"
        for dtype in (torch.float32, torch.bfloat16):
            row(
                f"{name}, tiles {dtype}".replace("torch.", ""),
                lambda i, p=packed, t=dtype: all_tiles(quantizer, p[i], t),
            )
        row(f"{name}, matmul 1 row", lambda i, p=packed: quantizer.matmul(x, p[i]))
        row(f"{name}, matmul 1 row transposed", lambda i, p=packed: quantizer.matmul(x, p[i], True))


def few_rows(options: Options, size: int, rows: list[int], count: int, row: Row) -> None:
    """Measure the fused kernel, for any number of rows, beside the product with decoded tiles."""
    quantizer = OPTQ(options)
    packed = [random_weight(size, options, False) for _ in range(count)]

    def product(x: Tensor, i: int, transpose: bool, most: int) -> Tensor:
        module.FEW_ROWS = most
        return quantizer.matmul(x, packed[i], transpose)

    for n in rows:
        x = torch.randn(n, size)  # square: it fits both directions
        for transpose in (False, True):
            name = f"{options.bits} bits, {n} rows{' transposed' if transpose else ''}"
            row(f"{name}, fused", lambda i, x=x, t=transpose, n=n: product(x, i, t, n))
            row(f"{name}, tiles", lambda i, x=x, t=transpose: product(x, i, t, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the optq plugin's kernels on this CPU.")
    parser.add_argument("--size", type=int, default=2048, help="out_features and in_features")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    parser.add_argument(
        "--rows", type=int, nargs="+", help="products of so many rows, fused and through tiles"
    )
    arguments = parser.parse_args()
    size, count = arguments.size, max(2, BYTES // (4 * arguments.size**2))

    def row(name: str, call: Callable[[int], object]) -> None:
        print(f"{name:<44} {milliseconds(call, count, arguments.seconds):8.3f} ms", flush=True)

    print(
        f"{size} x {size}, groups of {arguments.group_size}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for bits in BITS:
        options = Options(bits=bits, group_size=arguments.group_size)
        if arguments.rows:
            few_rows(options, size, arguments.rows, count, row)
        else:
            kernels_of(options, size, count, row)
    if not arguments.rows:
        dense, target, x = (
            [torch.randn(size, size) for _ in range(count)],
            torch.empty(size, size),
            torch.randn(1, size),
        )
        row("copy of a dense fp32 weight", lambda i: target.copy_(dense[i]))
        row("dense fp32, matmul 1 row", lambda i: x @ dense[i].t())
        row("dense fp32, matmul 1 row transposed", lambda i: x @ dense[i])


if __name__ == "__main__":
    main()
