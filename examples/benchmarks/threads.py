"""What a compiled kernel does to torch's attention in the same process, by numba's layer of threads.

    python examples/benchmarks/threads.py                             # as the plugins run
    NUMBA_THREADING_LAYER=omp python examples/benchmarks/threads.py   # numba's OpenMP beside torch's

Prints the CPU time of causal attention (8 x 9 heads x 512 x 64, fp32, 3 key heads) before and after the first kernel, and the wall
time of a decoded 2048 x 2048 tile between two matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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


def main() -> None:
    heads = [torch.randn(8, 512, count, 64).transpose(1, 2) for count in (9, 3, 3)]

    def attention() -> object:
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    before = least(attention, time.process_time)
    quantizer = registry.create("nf4")
    packed = quantizer.pack(torch.randn(2048, 2048))
    x = torch.randn(512, 2048)
    print(
        f"attention, CPU time   {before:8.1f} ms before a kernel, {least(attention, time.process_time):8.1f} ms after"
    )

    def between() -> float:
        x @ x.t()
        start = time.perf_counter()
        quantizer.dequantize_tile(packed, (0, 2048), torch.float32)
        return 1000 * (time.perf_counter() - start)

    times = sorted(between() for _ in range(50))
    print(f"tile between products {times[5]:8.2f} ms (tenth percentile), {times[25]:.2f} ms (median)")


if __name__ == "__main__":
    main()
