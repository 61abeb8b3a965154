"""Check the second moments that a quantizer is given with a weight.

Importing this module does not import torch. Plugins import it from :mod:`modulora_core.spec`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from modulora_core.errors import ShapeError, WeightError

if TYPE_CHECKING:
    from torch import Tensor


def check_hessian(
    quantizer: str, weight: Tensor, hessian: Tensor, output_hessian: Tensor | None = None
) -> None:
    """Refuse a weight and second moments that cannot be quantized together.

    Args:
        weight: ``[out, in]``, any float dtype.
        hessian: ``[in, in]``, any float dtype.
        output_hessian: ``[out, out]``, any float dtype.

    Raises ShapeError, WeightError.
    """
    _check_finite(quantizer, "weight", weight)
    for side, moment in ((weight.shape[1], hessian), (weight.shape[0], output_hessian)):
        if moment is None:
            continue
        if tuple(moment.shape) != (side, side):
            raise ShapeError(
                f"{quantizer}: expected a second moment of shape [{side}, {side}] for a weight "
                f"of shape {list(weight.shape)}, got {list(moment.shape)}"
            )
        _check_finite(quantizer, "second moment", moment)
        least = float(moment.diagonal().min()) if side else 0.0
        if least < 0:
            raise WeightError(
                f"{quantizer}: expected a second moment without negative numbers on its diagonal, "
                f"got {least:g}; calibrate again"
            )


def _check_finite(quantizer: str, name: str, tensor: Tensor) -> None:
    import torch

    total = float(tensor.detach().sum(dtype=torch.float64))  # one bad value makes the sum bad
    if not math.isfinite(total):
        shape = list(tensor.shape)
        raise WeightError(f"{quantizer}: expected a finite {name} {shape}, got NaN or Inf")
