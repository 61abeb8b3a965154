"""Time the toolkit's operations on vectors beside the same loops in plain numba.

    python examples/benchmarks/plain_loops.py

Prints the time of the plain loop as a multiple of the vectors' time, in turns on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from modulora_kernels.cpu import (
    CPUKernels,
    as_shorts,
    jit,
    load,
    lookup_pairs,
    multiply_add,
    narrow,
    splat,
    store,
    store_lookup,
    store_rounded,
    sum_of_lanes,
    table_for,
    to_floats,
)

from modulora_core.packed import PackedWeight

SIDE, ROWS, ROUNDS = 1024, 16, 60


@jit(borrows=True)
def round_vectors(codes: Any, scale: Any, out: Any) -> None:
    for k in range(0, codes.size, 32):
        low, high = to_floats(load(codes, k)), to_floats(load(codes, k + 16))
        store_rounded(out, k, low * scale, high * scale)


@jit(borrows=True)
def round_plain(codes: Any, scale: Any, out: Any) -> None:
    for k in range(codes.size):
        out[k] = narrow(np.float32(codes[k]) * scale, out[k])


@jit(borrows=True)
def look_up_vectors(pairs: Any, table: Any, out: Any) -> None:
    values = table_for(out, load(table, 0))
    for k in range(0, pairs.size, 16):
        both = load(pairs, k)
        store_lookup(out, 2 * k, values, as_shorts((both >> 4) | (both << 16)))


@jit(borrows=True)
def look_up_plain(pairs: Any, table: Any, out: Any) -> None:
    for k in range(pairs.size):
        out[2 * k] = narrow(table[pairs[k] >> 4], out[2 * k])
        out[2 * k + 1] = narrow(table[pairs[k] & 15], out[2 * k])


@jit(borrows=True)
def add_vectors(codes: Any, x: Any, out: Any) -> None:
    for row in range(out.size):
        a = b = splat(np.float32(0))
        for k in range(0, x.size, 32):
            at = row * x.size + k
            a = multiply_add(to_floats(load(codes, at)), load(x, k), a)
            b = multiply_add(to_floats(load(codes, at + 16)), load(x, k + 16), b)
        out[row] = sum_of_lanes(a + b)


@jit(borrows=True, fastmath=("reassoc", "contract"))
def add_plain(codes: Any, x: Any, out: Any) -> None:
    for row in range(out.size):
        total = np.float32(0)
        for k in range(x.size):
            total += np.float32(codes[row * x.size + k]) * x[k]
        out[row] = total


@jit(borrows=True)
def add_levels_vectors(pairs: Any, table: Any, x: Any, out: Any) -> None:
    levels, width = load(table, 0), x.size >> 1
    for row in range(out.size):
        a = b = splat(np.float32(0))
        for k in range(0, width, 16):
            high, low = lookup_pairs(levels, load(pairs, row * width + k))
            a = multiply_add(high, load(x, 2 * k), a)
            b = multiply_add(low, load(x, 2 * k + 16), b)
        out[row] = sum_of_lanes(a + b)


@jit(borrows=True, fastmath=("reassoc", "contract"))
def add_levels_plain(pairs: Any, table: Any, x: Any, out: Any) -> None:
    width = x.size >> 1
    for row in range(out.size):
        total = np.float32(0)
        for k in range(width):
            pair = pairs[row * width + k]
            total += table[pair >> 4] * x[2 * k] + table[pair & 15] * x[2 * k + 1]
        out[row] = total


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    (codes,) = weight
    for r in range(len(out)):
        at, to = (row + r) * codes.shape[1] + start, r * out.shape[1]
        for k in range(0, columns, 16):
            store(out, to + k, to_floats(load(codes, at + k)))


@jit(fastmath=("reassoc", "contract"))
def multiply_plain(codes: Any, x: Any, y: Any) -> None:
    w = np.empty((16, codes.shape[1]), np.float32)
    for first in range(0, len(codes), 16):
        decode((codes,), first, 0, codes.shape[1], w)
        for r in range(len(x)):
            for o in range(16):
                total = np.float32(0)
                for k in range(x.shape[1]):
                    total += w[o, k] * x[r, k]
                y[r, first + o] = total


def seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8, generator=generator)
    flat, pairs = codes.numpy().ravel(), codes.numpy().view(np.uint8).ravel()[: SIDE * SIDE // 2]
    table, x = torch.randn(16).numpy(), torch.randn(ROWS, SIDE)
    row, scale = x[0].numpy(), np.float32(0.01)
    bits, y = np.empty(SIDE * SIDE, np.int16), np.empty(SIDE, np.float32)
    kernels = CPUKernels(decode, lambda packed: (packed.tensors["codes"],))
    weight, many = (
        PackedWeight("plain", 1, (SIDE, SIDE), {"codes": codes}),
        np.empty((ROWS, SIDE), np.float32),
    )
    jobs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "round to bf16": (
            lambda: round_vectors(flat, scale, bits),
            lambda: round_plain(flat, scale, bits),
        ),
        "decode by 16 levels": (
            lambda: look_up_vectors(pairs, table, bits),
            lambda: look_up_plain(pairs, table, bits),
        ),
        "one row, 8 bits": (lambda: add_vectors(flat, row, y), lambda: add_plain(flat, row, y)),
        "one row, 16 levels": (
            lambda: add_levels_vectors(pairs, table, row, y),
            lambda: add_levels_plain(pairs, table, row, y),
        ),
        f"{ROWS} rows": (
            lambda: kernels.product(x, weight),
            lambda: multiply_plain(codes.numpy(), x.numpy(), many),
        ),
    }
    for name, calls in jobs.items():
        for call in calls:
            call()  # compiles
        times = [[seconds(call) for call in calls] for _ in range(ROUNDS)]
        vectors, plain = (min(column) for column in zip(*times, strict=True))
        print(f"{name:20s} {plain / vectors:5.1f}")


if __name__ == "__main__":
    main()
