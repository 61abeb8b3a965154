"""Measure the orthogonal transform on this CPU, beside a copy of its input and a product with a dense matrix of order K.

    python plugins/quip-sharp-e8/benchmarks/transform.py [--rows 1 512] [--sizes 2048 11008] [--seconds 0.5]

A time is the shortest of the repetitions that fit in ``--seconds``: others on the machine only add to it. K is the order of the
matrix that isn't Sylvester's; n · K multiply-adds a row are most of the work where it is large, and "product" is
what torch takes for those alone. "copy" is ``Tensor.copy_``, and can't be had for less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from modulora_quip_sharp_e8.transform import order, rotate

SIZES = (576, 2048, 4096, 5120, 11008, 13696, 28672, 29568)


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """The shortest time of ``call()``."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times)


def measure(rows: int, n: int, seconds: float) -> None:
    x, before, K = torch.randn(rows, n), torch.ones(n), order(n)
    other, columns, dense = torch.empty_like(x), torch.randn(rows * n // K, K), torch.randn(K, K)
    rotation = milliseconds(lambda: rotate(x, before=before), seconds)
    product = milliseconds(lambda: columns @ dense, seconds)
    copy = milliseconds(lambda: other.copy_(x), seconds)
    print(
        f"{rows:6} {n:7} {K:5} {rotation:11.3f} ms {product:11.3f} ms {copy:11.3f} ms", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the orthogonal transform on this CPU.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'rows':>6} {'n':>7} {'K':>5} {'rotate':>14} {'product':>14} {'copy':>14}")
    for rows in arguments.rows:
        for n in arguments.sizes:
            measure(rows, n, arguments.seconds)


if __name__ == "__main__":
    main()
