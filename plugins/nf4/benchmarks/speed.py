"""Measure the nf4 plugin on this CPU, beside bitsandbytes and a dense fp32 weight, all in one run.

    python plugins/nf4/benchmarks/speed.py [--size 2048] [--seconds 0.5] [--rows 16 32 64]

A row of the table is the tenth percentile of the repetitions that fit in ``--seconds``: others on the machine only
add time. Each repetition takes the next of several weights, more than the caches hold together, so
that codes and dense weights come from memory, as they do in a model. bitsandbytes is optional.

``--rows`` measures something else instead: products of so many rows, fused and through tiles, which is how
``FEW_ROWS`` was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from modulora_nf4 import quantizer as module
from modulora_nf4.quantizer import NF4, Options
from torch import Tensor

from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_bytes, tile_ranges

try:
    from bitsandbytes import functional as bnb
except ImportError:
    bnb = None

BYTES = 160 * 2**20  # of dense weights: several times a common L3 cache


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


def all_tiles(quantizer: NF4, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Every tile of the budget that the core uses, one after the other."""
    out_features, in_features = packed.shape
    budget = tile_bytes(torch.device("cpu"))
    for rows in tile_ranges(out_features, in_features * dtype.itemsize, budget):
        quantizer.dequantize_tile(packed, rows, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the nf4 plugin on this CPU.")
    parser.add_argument("--size", type=int, default=2048, help="out_features and in_features")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    parser.add_argument(
        "--rows", type=int, nargs="+", help="products of so many rows, fused and through tiles"
    )
    arguments = parser.parse_args()
    size, count = arguments.size, max(2, BYTES // (4 * arguments.size**2))
    dense = [torch.randn(size, size) for _ in range(count)]
    x = torch.randn(1, size)

    def row(name: str, call: Callable[[int], object]) -> None:
        print(f"{name:<44} {milliseconds(call, count, arguments.seconds):8.3f} ms", flush=True)

    print(f"{size} x {size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.rows:
        few_rows(dense, arguments.rows, row)
        return
    for double_quant in (False, True):
        quantizer = NF4(Options(double_quant=double_quant))
        packed = [quantizer.pack(w) for w in dense]
        name = f"nf4{' double_quant' if double_quant else ''}"
        row(f"{name}, pack", lambda i, q=quantizer: q.pack(dense[i]))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            row(
                f"{name}, tiles {dtype}".replace("torch.", ""),
                lambda i, q=quantizer, p=packed, t=dtype: all_tiles(q, p[i], t),
            )
        row(f"{name}, matmul 1 row", lambda i, q=quantizer, p=packed: q.matmul(x, p[i]))
        row(f"{name}, matmul 1 row transposed", lambda i, q=quantizer, p=packed: q.matmul(x, p[i], True))
    row("dense fp32, matmul 1 row", lambda i: x @ dense[i].t())
    row("dense fp32, matmul 1 row transposed", lambda i: x @ dense[i])
    if bnb is not None:
        compare(dense, x, row)


def few_rows(
    dense: list[Tensor], rows: list[int], row: Callable[[str, Callable[[int], object]], None]
) -> None:
    """Measure the fused kernel, for any number of rows, beside the product with decoded tiles."""
    module.FEW_ROWS = max(rows)
    quantizer = NF4()
    packed = [quantizer.pack(w) for w in dense]
    for n in rows:
        x = torch.randn(n, dense[0].shape[1])  # square: it fits both directions
        for transpose in (False, True):
            name = f"{n} rows{' transposed' if transpose else ''}"
            row(f"{name}, fused", lambda i, x=x, t=transpose: quantizer.matmul(x, packed[i], t))
            row(f"{name}, tiles", lambda i, x=x, t=transpose: Quantizer.matmul(quantizer, x, packed[i], t))


def compare(dense: list[Tensor], x: Tensor, row: Callable[[str, Callable[[int], object]], None]) -> None:
    """Measure bitsandbytes on the same weights. Its products go through ``matmul_4bit``, as its layers do."""
    states = [bnb.quantize_4bit(w, quant_type="nf4") for w in dense]
    row("bitsandbytes, quantize_4bit", lambda i: bnb.quantize_4bit(dense[i], quant_type="nf4"))
    row("bitsandbytes, dequantize_4bit float32", lambda i: bnb.dequantize_4bit(*states[i]))
    halves = [bnb.quantize_4bit(w.bfloat16(), quant_type="nf4") for w in dense]
    row("bitsandbytes, dequantize_4bit bfloat16", lambda i: bnb.dequantize_4bit(*halves[i]))
    from bitsandbytes import matmul_4bit

    row("bitsandbytes, matmul_4bit 1 row", lambda i: matmul_4bit(x, states[i][0].t(), states[i][1]))
    row("bitsandbytes, dequantize, 1 row transposed", lambda i: x @ bnb.dequantize_4bit(*states[i]))


if __name__ == "__main__":
    main()
