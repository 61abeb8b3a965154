"""Measure the quip-sharp-e8 plugin's search and kernels on this CPU, beside dense fp32 products, all in one run.

    python plugins/quip-sharp-e8/benchmarks/speed.py [--size 2048] [--vectors 50000] [--seconds 0.5] [--rows 1 4 16 32]

A row of the table is the shortest of the repetitions that fit in ``--seconds``: others on the machine only add time.
The search runs on vectors of eight numbers: Gaussian at the scale for 2 bits and at a smaller one, and with heavy tails
(Student's t with two degrees of freedom), which fall beyond the codebook. "L2" decodes 256 rows again and again, whose codes
the caches hold; everything else takes the next of several weights each time, more than the caches hold together, so that
codes and dense weights come from memory, as they do in a model. Codes are random: what they are makes no difference to the time.
Products are by C, without the rotations but where they are named; "tiles" is the product that decodes to tiles of the core's budget and
multiplies by those.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.products import by_codes, operands
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8
from torch import Tensor

from modulora_core import kernels
from modulora_core.spec import PackedWeight
from modulora_core.tiles import tiled_matmul

BYTES = 160 * 2**20  # of dense weights: several times a common L3 cache
BITS = (2, 3, 4)
L2_ROWS = 256

Row = Callable[[str, Callable[[int], object], float, str], None]


def seconds_of(call: Callable[[int], object], weights: int, seconds: float) -> float:
    """The shortest time of ``call(i)``, ``i`` going around the weights."""
    for i in range(weights):
        call(i)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    for i in itertools.cycle(range(weights)):
        begin = time.perf_counter()
        call(i)
        end = time.perf_counter()
        times.append(end - begin)
        if end > stop:
            return min(times)
    raise AssertionError("an endless loop ended")


def random_weight(size: int, bits: int) -> PackedWeight:
    """A packed weight of any codes, between scales of any numbers."""
    packed = QuIPSharpE8(Options(bits=bits)).layout((size, size)).empty("cpu")
    for tensor in packed.tensors.values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape))
        else:
            limits = torch.iinfo(tensor.dtype)
            tensor.copy_(
                torch.randint(limits.min, limits.max + 1, tensor.shape, dtype=tensor.dtype)
            )
    return packed


def searches(vectors: int, row: Row) -> None:
    cpu: Any = kernels.load("modulora_quip_sharp_e8.cpu_search", torch.device("cpu"))
    gaussian = torch.randn(vectors, 8)
    sources = {
        f"Gaussian, {codebooks.OPT_SCALE[2]}": codebooks.OPT_SCALE[2] * gaussian,
        "Gaussian, 0.9": 0.9 * gaussian,
        "heavy tails": torch.from_numpy(
            np.random.default_rng(0).standard_t(2, (vectors, 8))
        ).float(),
    }

    def search(kernel: Callable[..., None], x: Tensor, codes: Tensor, _: int) -> None:
        kernels.launch(kernel, x, codes)

    for kernel, dtype in ((cpu.search_e8p, torch.int16), (cpu.search_e81, torch.uint8)):
        codes = torch.empty(vectors, dtype=dtype)
        for name, x in sources.items():
            call = partial(search, kernel, x, codes)
            row(f"{kernel.__name__}, {name}", call, vectors / 1e6, "M vectors/s")


class Weights:
    """Random codes of several weights, ``[size, size]``, and what is done with the i-th of them."""

    def __init__(self, size: int, bits: int, count: int) -> None:
        self.shape, self.quantizer = (size, size), QuIPSharpE8(Options(bits=bits))
        self.weights = [random_weight(size, bits) for _ in range(count)]
        self.cpu: Any = kernels.load("modulora_quip_sharp_e8.cpu", torch.device("cpu"))
        self.out = torch.empty(size, size)

    def operands(self, i: int) -> tuple[Tensor, Tensor, int]:
        return operands(self.weights[i], slice(None), slice(None))

    def decode(self, rows: int, i: int) -> None:
        self.cpu.rows.dequantize(self.operands(i), 0, self.out[:rows])

    def decode_first(self, rows: int, _: int) -> None:
        self.decode(rows, 0)

    def fused(self, x: Tensor, transpose: bool, i: int) -> Tensor:
        return by_codes(x, self.weights[i], partial(self.operands, i), transpose, x.dtype)

    def whole(self, x: Tensor, i: int) -> Tensor:
        return self.quantizer.matmul(x, self.weights[i])

    def tiles(self, x: Tensor, transpose: bool, i: int) -> Tensor:
        operands = self.operands(i)

        def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
            out = torch.empty(stop - start, self.shape[1], dtype=dtype)
            self.cpu.rows.dequantize(operands, start, out)
            return out

        return tiled_matmul(x, tile, self.shape, transpose)


def decoding(size: int, count: int, row: Row) -> None:
    few = min(L2_ROWS, size)
    for bits in BITS:
        row(
            f"decode, {bits} bits, L2",
            partial(Weights(size, bits, 1).decode_first, few),
            few * size / 1e9,
            "G weights/s",
        )
        weights = Weights(size, bits, count)
        row(f"decode, {bits} bits", partial(weights.decode, size), size**2 / 1e9, "G weights/s")


def products(size: int, n: int, count: int, dense: list[Tensor], row: Row) -> None:
    """Products with ``n`` rows in both directions: dense, fused and through tiles."""
    x = torch.randn(n, size)
    row(f"{n} rows, dense fp32", lambda i: x @ dense[i].t(), 0, "")
    row(f"{n} rows transposed, dense fp32", lambda i: x @ dense[i], 0, "")
    for bits in BITS:
        weights = Weights(size, bits, count)
        for transpose in (False, True):
            name = f"{n} rows{' transposed' if transpose else ''}, {bits} bits"
            if n == 1 and not transpose:
                row(f"{name}, with the rotations, fused", partial(weights.whole, x), 0, "")
            row(f"{name}, fused", partial(weights.fused, x, transpose), 0, "")
            row(f"{name}, tiles", partial(weights.tiles, x, transpose), 0, "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the quip-sharp-e8 plugin's kernels on this CPU."
    )
    parser.add_argument("--size", type=int, default=2048, help="rows and columns; a multiple of 8")
    parser.add_argument("--vectors", type=int, default=50_000, help="for the search")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[1, 4, 16, 32], help="products of so many rows"
    )
    arguments = parser.parse_args()
    if arguments.size < 8 or arguments.size % 8:
        parser.error(f"--size: expected a positive multiple of 8, got {arguments.size}")
    size, count = arguments.size, max(2, BYTES // (4 * arguments.size**2))

    def row(name: str, call: Callable[[int], object], units: float, unit: str) -> None:
        taken = seconds_of(call, count, arguments.seconds)
        rate = f"{units / taken:8.2f} {unit}" if units else ""
        print(f"{name:<44} {1e3 * taken:8.3f} ms {rate}".rstrip(), flush=True)

    if kernels.load("modulora_quip_sharp_e8.cpu", torch.device("cpu")) is None:
        parser.error("numba: expected to import it, could not; pip install numba")
    print(f"{size} x {size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    searches(arguments.vectors, row)
    decoding(size, count, row)
    dense = [torch.randn(size, size) for _ in range(count)] if arguments.rows else []
    for n in arguments.rows:
        products(size, n, count, dense, row)


if __name__ == "__main__":
    main()
