"""What tuning is asked to do: :mod:`modulora_core.calibration.tuning` does it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from modulora_core.errors import DataError, OptionError

EPOCHS = 5
LEARNING_RATE = 5e-3
STEP_TOKENS = 512
"""Tokens of an optimizer step. Small steps are more steps, and hold fewer activations."""

HELD_OUT = 16
"""One sample of so many isn't trained on and judges the outcome; at least one."""


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """How each decoder block is tuned after it was quantized.

    Attributes:
        epochs: passes over the calibration samples for each block; 0 is the same as no tuning.
        learning_rate: Adam's peak, for factors that begin at 1: each step changes them by at most about this.
        batch_size: samples of an optimizer step; None for about :data:`STEP_TOKENS` tokens.

    Raises:
        OptionError: ``epochs`` is negative, ``learning_rate`` isn't a positive number, or ``batch_size`` is less than 1.
    """

    epochs: int = EPOCHS
    learning_rate: float = LEARNING_RATE
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise OptionError(f"tuning epochs: expected 0 (no tuning) or more, got {self.epochs}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise OptionError(
                f"tuning learning_rate: expected a positive number, got {self.learning_rate}"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"tuning batch_size: expected at least 1, got {self.batch_size}")

    def batches(self, samples: int, seq_len: int) -> tuple[list[slice], list[slice]]:
        """The samples of each optimizer step, and of each batch that is held out: the last of the samples.

        Raises:
            DataError: there is one sample only.
        """
        if samples < 2:
            raise DataError(
                f"tuning: expected at least 2 calibration samples, one of them to judge by, got {samples}; give more text or "
                "shorter samples (seq_len)"
            )
        size = self.step_samples(seq_len)
        trained = samples - max(1, samples // HELD_OUT)
        return _slices(0, trained, size), _slices(trained, samples, size)

    def step_samples(self, seq_len: int) -> int:
        """Samples of an optimizer step."""
        return self.batch_size or max(1, STEP_TOKENS // seq_len)

    def to_json(self, seq_len: int) -> dict[str, Any]:
        """For the checkpoint's record, beside the samples'."""
        return {
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "batch_size": self.step_samples(seq_len),
        }


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
