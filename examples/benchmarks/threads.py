"""How threads wait: numba's beside torch's, and torch's for each other when another process wants the cores.

    python examples/benchmarks/threads.py                               # as the kernels run
    python examples/benchmarks/threads.py --nested                      # with what numba allows and the kernels take back
    python examples/benchmarks/threads.py --busy 1                      # with another process that computes
    GOMP_SPINCOUNT=3000 python examples/benchmarks/threads.py --busy 1  # with threads that soon sleep, as the CLI has them
    NUMBA_THREADING_LAYER=workqueue python examples/benchmarks/threads.py  # with numba's own threads

Prints the CPU time of causal attention (8 x 9 heads x 512 x 64, fp32, 3 key heads) before and after the first kernel, the wall time of
a decoded 2048 x 2048 tile between two matrix products, and that of 100 times a product and a cosine on 512 x 576 values.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modulora_core import registry


def least(run: Callable[[], object], clock: Callable[[], float], repeats: int = 20) -> float:
    """Milliseconds of the fastest of some turns."""
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return 1000 * min(times)


def measure(nested: bool) -> None:
    torch.set_num_threads(
        torch.get_num_threads()
    )  # as reading a model does; attention suffers after such a call
    heads = [torch.randn(8, 512, count, 64).transpose(1, 2) for count in (9, 3, 3)]

    def attention() -> object:
        return torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=True
        )

    before = least(attention, time.process_time)
    quantizer = registry.create("nf4")
    packed = quantizer.pack(torch.randn(2048, 2048))
    if nested:
        for library in {
            m.split(maxsplit=5)[5]
            for m in Path("/proc/self/maps").read_text().splitlines()
            if "libgomp" in m
        }:
            ctypes.CDLL(library).omp_set_max_active_levels(2)
    x, small = torch.randn(512, 2048), torch.randn(512, 576)
    print(
        f"attention, CPU time   {before:8.1f} ms before a kernel, {least(attention, time.process_time):.1f} ms after"
    )

    def between() -> float:
        x @ x.t()
        start = time.perf_counter()
        quantizer.dequantize_tile(packed, (0, 2048), torch.float32)
        return 1000 * (time.perf_counter() - start)

    times = sorted(between() for _ in range(50))
    print(f"tile between products {times[25]:8.2f} ms (median)")
    square = torch.randn(576, 576)
    operations = least(
        lambda: [torch.cos(small) @ square for _ in range(100)], time.perf_counter, 10
    )
    print(f"products and cosines  {operations:8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--busy", type=int, default=0, help="how many other processes compute meanwhile"
    )
    parser.add_argument(
        "--nested", action="store_true", help="allow teams of threads inside of teams"
    )
    asked = parser.parse_args()
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(asked.busy)
    ]
    try:
        measure(asked.nested)
    finally:
        for process in others:
            process.kill()


if __name__ == "__main__":
    main()
