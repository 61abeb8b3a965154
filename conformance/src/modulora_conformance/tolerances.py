"""How far from the float64 oracle a result may be, by the dtype of the input, each with its reason. The same everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A bound and why it is what it is."""

    value: float
    reason: str


PRODUCT = {
    torch.float64: Tolerance(1e-13, "fp64 sums of thousands of terms, in any order and through a rotation, lose about 100 ulps at most"),
    torch.float32: Tolerance(2e-6, "fp32 sums in any order: 17 ulps of the largest that the sum could be"),
    torch.float16: Tolerance(2**-10, "tiles rounded to fp16 and a result rounded to fp16, 2^-11 each, summed in fp32"),
    torch.bfloat16: Tolerance(2**-6, "rotated inputs, tiles and results rounded to bf16, 2^-8 each, which a rotation back may add up"),
}  # fmt: skip
"""For :func:`modulora_conformance.oracle.product_error`."""

GRADIENT = {
    torch.float64: Tolerance(1e-12, "fp64 sums, one product after another"),
    torch.float32: Tolerance(1e-5, "fp32 sums, one product after another"),
    torch.float16: Tolerance(4e-3, "inputs and outputs of the layer are rounded to fp16, 2^-11, about three times in a row"),
    torch.bfloat16: Tolerance(3e-2, "inputs and outputs of the layer are rounded to bf16, 2^-8, about three times in a row"),
}  # fmt: skip
"""For :meth:`modulora_conformance.problems.Problem.error`, and between results that come from the same kernels."""

ROUNDING = {
    torch.float64: Tolerance(2**-21, "a float64 tile holds the float32 values, or is computed in fp64 where a tile is a sum"),
    torch.float32: Tolerance(0.0, "the same bits"),
    torch.float16: Tolerance(2**-10, "one rounding of the float32 tile, 2^-11, and its subnormals"),
    torch.bfloat16: Tolerance(2**-8, "one rounding of the float32 tile, 2^-9"),
}  # fmt: skip
"""Tiles in a dtype against the float32 tile, as a share of the largest magnitude in the weight."""
