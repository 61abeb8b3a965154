"""Sums H = E[xxᵀ] while the inputs of a layer arrive."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modulora_core import distributed
from modulora_core.dense_products import add_product
from modulora_core.errors import WorkError
from modulora_core.spec import Calibration

STRIP = 192
"""Columns of H per product. Narrow strips waste little of the upper half; wide ones are faster."""


class SecondMoment:
    """The sum of xxᵀ over input vectors x of ``in_features`` values, in fp32.

    H is symmetric, so only its lower half is computed, strip by strip.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Add input vectors, ``[..., in]``, any float dtype."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)  # [n, in]
        for start, stop in _strips(rows.shape[1]):
            columns = rows[:, start:stop].contiguous()
            add_product(self._sum[start:, start:stop], rows[:, start:].t(), columns)
        self.samples += rows.shape[0]

    def add_up(self) -> None:
        """Add the sums of all processes of a distributed run."""
        samples = torch.tensor(self.samples, device=self._sum.device)
        distributed.add_up(self._sum)
        distributed.add_up(samples)
        self.samples = int(samples)

    def mean(self, layer: str) -> Calibration:
        """H, fp32 ``[in, in]``, symmetric. Without any input H is the identity.

        Raises WorkError: an input of ``layer`` is NaN or Inf, or its square exceeds fp32.
        """
        if self.samples == 0:
            return Calibration(torch.eye(len(self._sum)).to(self._sum), 0)
        H = (self._sum / self.samples).tril_()
        if not math.isfinite(float(H.sum(dtype=torch.float64))):  # one bad value makes the sum bad
            raise WorkError(
                f"{layer}: expected finite inputs on the calibration text, got NaN or Inf; the "
                "model overflows on it (try `modulora evaluate` with the same text), or the "
                "layers before it were quantized too coarsely"
            )
        for start, stop in _strips(len(H)):  # in place: H of a 7B model's widest layer is 485 MB
            corner = H[start:stop, start:stop]
            corner += corner.tril(-1).t()
            H[start:stop, stop:] = H[stop:, start:stop].t()
        return Calibration(H, self.samples)


def _strips(columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + STRIP, columns)) for start in range(0, columns, STRIP)]
