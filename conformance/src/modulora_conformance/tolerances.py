"""Bounds the distance from the float64 oracle, by the dtype of the input, each with its reason.

The bounds are the same for every quantizer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """A bound and its reason."""

    value: float
    reason: str


PRODUCT = {
    torch.float64: Tolerance(
        1e-13, "fp64 sums of thousands of terms, in any order and rotated, lose at most 100 ulps"
    ),
    torch.float32: Tolerance(2e-6, "fp32 sums in any order: 17 ulps of the largest possible sum"),
    torch.float16: Tolerance(2**-10, "tiles and results rounded to fp16, 2^-11 each, fp32 sums"),
    torch.bfloat16: Tolerance(
        2**-6, "rotated inputs, tiles and results rounded to bf16, 2^-8 each, and rotated back"
    ),
}
"""For :func:`modulora_conformance.oracle.product_error`."""

GRADIENT = {
    torch.float64: Tolerance(1e-12, "fp64 sums, one product after another"),
    torch.float32: Tolerance(1e-5, "fp32 sums, one product after another"),
    torch.float16: Tolerance(
        2**-8, "eight roundings to fp16, 2^-11 each: x, A, B, x Aᵀ, both products, their sum, y"
    ),
    torch.bfloat16: Tolerance(
        2**-5, "eight roundings to bf16, 2^-8 each: x, A, B, x Aᵀ, both products, their sum, y"
    ),
}
"""For :meth:`modulora_conformance.problems.Problem.error`, and for results of the same kernels."""

ROUNDING = {
    torch.float64: Tolerance(2**-21, "the float32 values; a tile that is a sum is summed in fp64"),
    torch.float32: Tolerance(0.0, "the same bits"),
    torch.float16: Tolerance(2**-10, "one rounding of the float32 tile, 2^-11, and its subnormals"),
    torch.bfloat16: Tolerance(2**-8, "one rounding of the float32 tile, 2^-9"),
}
"""For :func:`modulora_conformance.oracle.tile_error` of a tile against the float32 tile."""
