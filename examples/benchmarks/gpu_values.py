"""Compares a quantizer's values on a GPU, or in Triton's interpreter, with the CPU's.

Cases and bounds are the conformance kit's. Beside its checks on one small shape, these take several
odd shapes, a large one, and packing on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from llama import RandomWeights
from methods import pack
from modulora_conformance.cases import both_ways, fit, gaussian, tile
from modulora_conformance.oracle import dense, product_error, tile_error
from modulora_conformance.tolerances import PRODUCT, ROUNDING
from torch import Tensor
from turns import reason

from modulora_core.registry import Choice
from modulora_core.spec import PackedWeight, Quantizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

ODD_SHAPES = ((1, 1), (3, 5), (37, 52), (130, 300))
"""Before they are made to fit the quantizer: no multiples of a kernel's blocks."""

ROWS = (1, 3, 17, 70)
"""One case for each kind of product: one row, a few, enough for tensor cores, and tiles."""

MOST_WORSE = 0.01
"""Packing on the device may err more than on the CPU by this share of the weight's norm."""


class Truth(NamedTuple):
    """A packed weight on the CPU with its Ŵ, computed there in fp32 and fp64, ``[out, in]``."""

    packed: PackedWeight
    tile: Tensor
    exact: Tensor


def truth_of(quantizer: Quantizer, packed: PackedWeight) -> Truth:
    return Truth(packed, tile(quantizer, packed).clone(), dense(quantizer, packed))


def truths(words: str, shapes: Sequence[tuple[int, int]] = ODD_SHAPES) -> list[Truth]:
    """Gaussian weights of the next shapes that the quantizer takes, packed on the CPU."""
    quantizer = Choice.parse(words).create()
    fitting = dict.fromkeys(fit(quantizer, *shape) for shape in shapes)
    return [truth_of(quantizer, pack(quantizer, gaussian(shape, 0))) for shape in fitting]


class ValuesJob:
    """A quantizer whose values are checked on a device."""

    def __init__(self, words: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")  # some images ask for TF32
        self._quantizer, self._device = Choice.parse(words).create(), torch.device(device)

    def check(self, truths: Sequence[Truth], rows: Sequence[int]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for truth in truths:
            found += checks(self._quantizer, truth, self._device, rows)
            found.append(self._check_packing(truth))
        return found

    def check_large(self, shape: tuple[int, int], rows: Sequence[int]) -> list[dict[str, Any]]:
        packed = RandomWeights(self._quantizer).packed(fit(self._quantizer, *shape))
        truth = truth_of(self._quantizer, packed)
        return list(checks(self._quantizer, truth, self._device, rows))

    def _check_packing(self, truth: Truth) -> dict[str, Any]:
        W = gaussian(truth.packed.shape, 0)

        def measured() -> tuple[float, float, str]:
            again = tile(self._quantizer, pack(self._quantizer, W.to(self._device))).cpu()
            worse = (W - again).norm() - (W - truth.tile).norm()
            return float(worse / W.norm()), MOST_WORSE, ""

        return outcome("pack", truth, torch.float32, measured)


def checks(
    quantizer: Quantizer, truth: Truth, device: torch.device, rows: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The outcome of each check; a check that raises has failed."""
    packed = truth.packed.to(device)

    def check_tile(dtype: torch.dtype) -> tuple[float, float, str]:
        found, start = tile(quantizer, packed, dtype), packed.shape[0] // 3
        same = torch.equal(tile(quantizer, packed, dtype, start), found[start:])
        limit = ROUNDING[dtype].value + PRODUCT[torch.float32].value
        fault = "" if same else "rows by themselves have other bits"
        return tile_error(found.cpu(), truth.tile), limit, wrong_kind(found, dtype, device) or fault

    def check_product(x: Tensor, transpose: bool) -> tuple[float, float, str]:
        given = x.to(device)
        y = quantizer.matmul(given, packed, transpose)
        same = torch.equal(y, quantizer.matmul(given, packed, transpose))
        fault = "" if same else "the same product has other bits another time"
        error = product_error(y.cpu(), x, truth.exact, transpose)
        return error, PRODUCT[x.dtype].value, wrong_kind(y, x.dtype, device) or fault

    for dtype in DTYPES:
        yield outcome("tile", truth, dtype, partial(check_tile, dtype))
        for n in rows:
            for transpose, x in both_ways(truth.packed, n, dtype=dtype, seed=n):
                name = f"{'y Ŵ' if transpose else 'x Ŵᵀ'}, {n} row{'s' * (n > 1)}"
                yield outcome(name, truth, dtype, partial(check_product, x, transpose))


def wrong_kind(found: Tensor, dtype: torch.dtype, device: torch.device) -> str:
    is_right = (found.dtype, found.device.type) == (dtype, device.type)
    return "" if is_right else f"expected {dtype} on {device}, got {found.dtype} on {found.device}"


def outcome(
    check: str, truth: Truth, dtype: torch.dtype, measured: Callable[[], tuple[float, float, str]]
) -> dict[str, Any]:
    """A check as JSON. ``measured`` returns the error, its limit, and another fault or ``""``."""
    try:
        error, limit, fault = measured()
    except Exception as failure:  # a kernel may raise anything
        error, limit, fault = float("inf"), 0.0, reason(failure)
    return {
        "check": check, "shape": list(truth.packed.shape), "dtype": str(dtype).partition(".")[2],
        "error": error, "limit": limit, "passed": error <= limit and not fault, "reason": fault,
    }  # fmt: skip
