"""L3: torch's modes, threads and defaults change no result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import (
    both_ways,
    fit,
    gaussian,
    identity,
    inputs,
    pack,
    packed,
    tile,
)
from modulora_conformance.changes import check_same_bytes, kept_settings, same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.products import FORWARD, LEADING, TRANSPOSED
from modulora_conformance.levels.state import NEW
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import PackedWeight, Quantizer

SHAPE = (72, 160)
"""No other check's: whatever is cached by a shape is made within the mode."""

ROWS = (1, 3, 33, 140)

MANY = 640
"""Rows of two threads at once: each product takes long enough to meet the other."""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    with kept_settings():
        torch.set_default_dtype(dtype)
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    with kept_settings():
        torch.use_deterministic_algorithms(True)
        yield


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "deterministic algorithms": _deterministic,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
}


class Modes(Level):
    """Products, lookups and packing are the same in each mode of torch, on any threads."""

    level, title = "L3", "products"

    @pytest.mark.parametrize("mode", MODES)
    @needs(FORWARD, TRANSPOSED, LEADING, LOOKUP, NEW, "test_the_default_dtype_does_not_matter")
    def test_a_mode_of_torch_changes_nothing(self, quantizer, measurements, mode):
        """If this fails: within a mode of torch, packing, a tile, a lookup or a product differs.

        Name the dtype and the device of each new tensor. Turn autocast off inside of `matmul` by
        `modulora_core.dense_products.without_autocast(x.device)`, which takes any device.
        """
        weight = gaussian(fit(quantizer, *SHAPE), 70)
        ids = torch.tensor([[9, 0, 9], [3, 40, 8]])
        operands = [
            (transpose, x)
            for n in ROWS
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for transpose, x in both_ways(pack(quantizer, weight), n, dtype=dtype, seed=71)
        ]
        inside = type(quantizer)(quantizer.options)
        required = quantizer.spec.calibration == "required"
        calibration = identity(weight.shape[1]) if required else None
        with MODES[mode]():
            found = inside.pack(weight, calibration)
            rows, part = inside.lookup(ids, found, torch.float32), tile(inside, found)
            products = [inside.matmul(x, found, transpose) for transpose, x in operands]
        expected = pack(quantizer, weight)
        check_same_bytes(expected, found, f"packed with {mode}")
        whole = tile(quantizer, expected)
        assert same_bits(part, whole), f"the tile with {mode}: expected the same bits"
        assert same_bits(rows, whole[ids]), f"rows looked up with {mode}: expected the same bits"
        W = dense(quantizer, expected)
        for (transpose, x), y in zip(operands, products, strict=True):
            case = f"{mode}, {len(x)} rows, {transpose=}"
            assert (y.dtype, y.device) == (x.dtype, x.device), (
                f"product with {case}: expected {x.dtype} on {x.device}, got {y.dtype} on "
                f"{y.device}"
            )
            error, limit = product_error(y, x, W, transpose), PRODUCT[x.dtype].value
            measurements.at_most(f"product with a mode in {x.dtype}", error, limit, case=case)

    @pytest.mark.parametrize("threads", [1, 2, 3, 8, 16], ids=lambda n: f"{n} threads")
    @needs(FORWARD, TRANSPOSED, LOOKUP, "test_reading_leaves_global_state_alone")
    def test_any_number_of_threads_gives_the_same(self, quantizer, measurements, threads):
        """If this fails: a part of the work is lost or done twice with some number of threads.

        Parts are cut by the number of threads, which does not divide them. Cut them by rows.
        """
        found = packed(quantizer, (100, 224))
        W, whole = dense(quantizer, found), tile(quantizer, found)
        ids = torch.arange(found.shape[0] - 1, -1, -3)
        with kept_settings():
            torch.set_num_threads(threads)
            part, rows = tile(quantizer, found), quantizer.lookup(ids, found, torch.float32)
            products = [
                (transpose, x, quantizer.matmul(x, found, transpose))
                for n in (1, 5, 35, 130)
                for transpose, x in both_ways(found, n, seed=72)
            ]
        assert same_bits(part, whole), f"the tile on {threads} threads: expected the same bits"
        assert same_bits(rows, whole[ids]), f"a lookup on {threads} threads: expected the same bits"
        for transpose, x, y in products:
            case = f"{threads} threads, {len(x)} rows, {transpose=}"
            error, limit = product_error(y, x, W, transpose), PRODUCT[x.dtype].value
            measurements.at_most("product on some threads", error, limit, case=case)

    @pytest.mark.threads
    @needs(FORWARD, TRANSPOSED, "test_two_threads_get_what_one_gets")
    def test_two_threads_multiply_many_rows(self, quantizer, measurements):
        """If this fails: two threads that multiply many rows at once disturb each other.

        A path for many rows keeps scratch memory in the instance or the module. Use local
        variables.
        """
        weights = [packed(quantizer, (96, 256), seed) for seed in (73, 74)]
        dense_ones = [dense(quantizer, weight) for weight in weights]

        def work(i: int) -> list[tuple[int, bool, Tensor, Tensor]]:
            return [_product(quantizer, weights, i, rows) for rows in (MANY, 129, MANY, 48)]

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(2) as pool:
                found = [one for many in pool.map(work, [0, 1, 2, 3] * 3) for one in many]
        finally:
            sys.setswitchinterval(interval)
        for i, transpose, x, y in found:
            error = product_error(y, x, dense_ones[i], transpose)
            case, limit = f"{len(x)} rows, {transpose=}", PRODUCT[x.dtype].value
            measurements.at_most("product beside another thread", error, limit, case=case)


def _product(
    quantizer: Quantizer, weights: list[PackedWeight], i: int, rows: int
) -> tuple[int, bool, Tensor, Tensor]:
    transpose, weight = i >= 2, weights[i % 2]
    x = inputs((rows,), weight.shape[0 if transpose else 1], torch.float32, i)
    return i % 2, transpose, x, quantizer.matmul(x, weight, transpose)
