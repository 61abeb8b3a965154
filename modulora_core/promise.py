"""What a quantizer promises, as numbers that the conformance kit holds it to.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Size and error with some options.

    The errors are relative, ``‖W − Ŵ‖ / ‖W‖`` (Frobenius), of a weight of about ``[256, 512]``, packed without calibration data (H
    the identity where one is needed). For Gaussian weights no quantizer of b bits is below 2⁻ᵇ (the rate-distortion bound).

    Attributes:
        options: names and values; the others are at their defaults.
        bits_per_weight: at most so many are stored for a ``[2048, 2048]`` layer, scales and all.
        gaussian: the error for independent normal values.
        heavy_tailed: for Student's t with 3 degrees of freedom.
        outlier_columns: for normal values with every 64th column 20 times as large.
        constant: for a weight whose every value is the same.

    Raises:
        ValueError: a number isn't finite and positive, or an error is negative.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    bits_per_weight: float
    gaussian: float
    heavy_tailed: float
    outlier_columns: float
    constant: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bits_per_weight) and self.bits_per_weight > 0):
            raise ValueError(f"bits_per_weight: expected a positive number, got {self.bits_per_weight!r}")
        for name in ("gaussian", "heavy_tailed", "outlier_columns", "constant"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a relative error, 0 or more, got {value!r}")

    @property
    def title(self) -> str:
        """The options in one line: ``"bits=2, group_size=64"``; ``"defaults"`` where there are none."""
        return titled(self.options)


def titled(options: Mapping[str, Any]) -> str:
    """Options in one line, as :attr:`Promise.title` has them."""
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"
