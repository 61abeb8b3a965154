"""A quantizer's values on a GPU, or in Triton's interpreter, beside those of the CPU without Triton.

Bounds and their reasons are the conformance kit's: tiles as close as fp32 sums in another order come, where a tile is a sum, and whether
they are the same to the bit is told; products by the rounding of tiles and results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from modulora_conformance.cases import fit, gaussian, identity
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT, ROUNDING
from torch import Tensor
from turns import reason

from modulora_core.packed import PackedLayout, PackedWeight
from modulora_core.spec import Quantizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

ODD_SHAPES = ((1, 1), (3, 5), (37, 52), (130, 300))
"""Before they are made to fit the quantizer: no multiples of a kernel's blocks."""

ROWS = (1, 3, 17, 70)
"""Each way that products have: one row, a few, enough for tensor cores, and tiles."""


@dataclass(frozen=True)
class Truth:
    """A packed weight on the CPU, and what plain torch or numba there say it stands for.

    Attributes:
        tile: Ŵ in fp32; exact: in fp64; ``[out, in]``.
    """

    packed: PackedWeight
    tile: Tensor
    exact: Tensor

    @classmethod
    def of(cls, quantizer: Quantizer, packed: PackedWeight) -> Truth:
        packed = packed.to("cpu")
        rows = (0, packed.shape[0])
        values = [
            quantizer.dequantize_tile(packed, rows, t).clone()
            for t in (torch.float32, torch.float64)
        ]
        return cls(packed, *values)

    def sent(self) -> tuple[Any, ...]:
        """For :meth:`received` in another process."""
        return self.packed.layout.to_json(), dict(self.packed.tensors), self.tile, self.exact

    @classmethod
    def received(cls, layout: Any, tensors: Any, tile: Tensor, exact: Tensor) -> Truth:
        return cls(PackedLayout.from_json(layout).fill(tensors), tile, exact)


def pack(quantizer: Quantizer, weight: Tensor) -> PackedWeight:
    """Packed on the weight's device, with an identity H where calibration is taken."""
    calibration = None
    if quantizer.spec.calibration != "none":
        seen = identity(weight.shape[1])
        calibration = type(seen)(seen.hessian.to(weight.device), seen.samples)
    with torch.no_grad():
        return quantizer.pack(weight, calibration)


def truths(quantizer: Quantizer, shapes: Sequence[tuple[int, int]] = ODD_SHAPES) -> list[Truth]:
    """Weights of the next shapes that the quantizer takes, packed on the CPU; each shape once."""
    fitting = dict.fromkeys(fit(quantizer, *shape) for shape in shapes)
    return [Truth.of(quantizer, pack(quantizer, gaussian(shape, 0))) for shape in fitting]


def check(
    quantizer: Quantizer, truth: Truth, device: torch.device, rows: Sequence[int] = ROWS, dtypes: Sequence[torch.dtype] = DTYPES
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each check as ``{"check", "shape", "dtype", "error", "limit", "passed", "reason"}``; a check that raises has failed."""
    packed = truth.packed.to(device)
    for dtype in dtypes:
        checks = [("tile", partial(_tile, quantizer, packed, truth, dtype))]
        for n in rows:
            size = f"{n} row{'s' * (n > 1)}"
            checks.append(
                (f"x Ŵᵀ, {size}", partial(_product, quantizer, packed, truth, n, False, dtype))
            )
            checks.append(
                (f"y Ŵ, {size}", partial(_product, quantizer, packed, truth, n, True, dtype))
            )
        for what, run in checks:
            row: dict[str, Any] = {
                "check": what,
                "shape": list(packed.shape),
                "dtype": str(dtype).removeprefix("torch."),
                "reason": "",
            }
            try:
                error, limit, unequal = run()
                row |= {
                    "error": error,
                    "limit": limit,
                    "passed": error <= limit and not unequal,
                    "reason": unequal,
                }
            except Exception as failure:  # whatever a kernel raises
                row |= {"error": None, "limit": None, "passed": False, "reason": reason(failure)}
            yield row


def _tile(quantizer: Quantizer, packed: PackedWeight, truth: Truth, dtype: torch.dtype) -> tuple[float, float, str]:  # fmt: skip
    """The largest error as a share of the largest weight, its limit, and what isn't as it must be to the bit."""
    last = packed.shape[0]
    tile = quantizer.dequantize_tile(packed, (0, last), dtype)
    part = quantizer.dequantize_tile(packed, (last // 3, last), dtype)
    difference = (tile.cpu().double() - truth.tile.to(dtype).double()).abs().max()
    largest = truth.tile.double().abs().max().clamp(min=1e-300)
    error = float((difference / largest).nan_to_num(nan=torch.inf))
    unequal = "" if torch.equal(part, tile[last // 3 :]) else "rows of the whole have other bits"
    if (tile.dtype, tile.device.type) != (dtype, packed.device.type):
        unequal = f"a tile of {tile.dtype} on {tile.device}"
    return error, ROUNDING[dtype].value + PRODUCT[torch.float32].value, unequal


def _product(
    quantizer: Quantizer,
    packed: PackedWeight,
    truth: Truth,
    n: int,
    transpose: bool,
    dtype: torch.dtype,
) -> tuple[float, float, str]:
    features = packed.shape[0 if transpose else 1]
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(n)).to(dtype)
    given = x.to(packed.device)
    y = quantizer.matmul(given, packed, transpose)
    again = quantizer.matmul(given, packed, transpose)
    unequal = "" if torch.equal(y, again) else "the same product has other bits another time"
    if (y.dtype, y.device.type) != (dtype, packed.device.type):
        unequal = f"a product of {y.dtype} on {y.device}"
    return product_error(y.cpu(), x, truth.exact, transpose), PRODUCT[dtype].value, unequal
