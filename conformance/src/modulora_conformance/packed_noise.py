"""Pack random weights of any quantizer, for ``modulora doctor`` and ``modulora check-gpu``."""

from __future__ import annotations

from contextlib import suppress

import torch

from modulora_core.errors import ShapeError
from modulora_core.spec import Calibration, PackedWeight, Quantizer

MOST_WIDER = 256
"""Steps by which columns grow until a quantizer's options accept them."""


def accepted(quantizer: Quantizer, shape: tuple[int, int]) -> tuple[int, int]:
    """The first shape from ``shape`` on that the quantizer packs with its options."""
    rows, columns = quantizer.spec.next_shape(shape)
    for _ in range(MOST_WIDER):
        with suppress(ShapeError):
            quantizer.check_shape((rows, columns))
            break
        columns += quantizer.spec.in_multiple
    return rows, columns


def packed_noise(quantizer: Quantizer, shape: tuple[int, int]) -> PackedWeight:
    """A Gaussian weight of an accepted shape, packed on the CPU."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 32
    calibration = Calibration(torch.eye(shape[1]), shape[1])
    return quantizer.pack(weight, calibration if quantizer.wants_calibration else None)
