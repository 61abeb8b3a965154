"""H = E[xxᵀ], summed up as the inputs come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modulora_core.devices.dense_products import add_product
from modulora_core.errors import WorkError
from modulora_core.spec import Calibration

STRIP = 192
"""Columns of H that one product gives: narrow strips waste little of the upper half, wide ones multiply faster."""


class SecondMoment:
    """The sum of xxᵀ over input vectors x of ``in_features`` values, in fp32.

    H is symmetric: only the lower half is computed, strip by strip.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Add input vectors, ``[..., in]``, any float dtype."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)  # [n, in]
        for start in range(0, rows.shape[1], STRIP):
            stop = min(start + STRIP, rows.shape[1])
            add_product(
                self._sum[start:, start:stop], rows[:, start:].t(), rows[:, start:stop].contiguous()
            )
        self.samples += rows.shape[0]

    def mean(self, layer: str) -> Calibration:
        """H, fp32 ``[in, in]``, symmetric. With no input vector at all it is the identity, which weighs all errors alike.

        Raises:
            WorkError: NaN or Inf among the inputs, or squares beyond fp32; ``layer`` is named.
        """
        if self.samples == 0:
            return Calibration(torch.eye(self._sum.shape[0], device=self._sum.device), 0)
        H = (self._sum / self.samples).tril_()
        if not math.isfinite(float(H.sum(dtype=torch.float64))):  # one bad value makes the sum bad
            raise WorkError(
                f"{layer}: expected finite inputs on the calibration text, got NaN or Inf; the model overflows on it "
                "(try `modulora evaluate` with the same text), or the layers before it were quantized too coarsely"
            )
        _mirror(H)
        return Calibration(H, self.samples)


def _mirror(H: Tensor) -> None:
    """Copy the lower half to the upper one, in place: H of a 7B model's widest layer takes 485 MB."""
    for start in range(0, len(H), STRIP):
        stop = min(start + STRIP, len(H))
        corner = H[start:stop, start:stop]
        corner += corner.tril(-1).t()
        H[start:stop, stop:] = H[stop:, start:stop].t()
