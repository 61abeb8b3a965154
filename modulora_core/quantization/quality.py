"""Settings of ``--quality``: fewer or more seconds of quantizing, for the same size.

A plugin offers options in :attr:`modulora_core.spec.QuantizerSpec.qualities`. The settings of the
calibration are here, the same for every plugin. Explicit settings win over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from modulora_core.calibration import CalibrationConfig, TuningConfig
from modulora_core.errors import OptionError
from modulora_core.quantization.assignment import Assignment
from modulora_core.registry import Choice

Quality = Literal["fast", "balanced", "best"]

FAST_SAMPLES = 32
"""Samples of ``fast``."""

TUNING = TuningConfig(epochs=1)
"""The tuning of ``best``, where packed weights can be rescaled."""


def choice_of(choice: Choice, quality: Quality) -> Choice:
    """The choice with the options that its plugin offers for ``quality``, unless it has its own.

    An offer that the choice's own options exclude is left out. Raises OptionError, PluginError.
    """
    if quality == "balanced":
        return choice
    offered = choice.create().spec.qualities.get(quality, {})
    for name, value in offered.items():
        more = Choice(choice.quantizer, {name: value, **choice.options})
        with suppress(OptionError):
            more.create()
            choice = more
    return choice


def calibration_of(
    config: CalibrationConfig | None, quality: Quality, choices: Sequence[Choice]
) -> CalibrationConfig | None:
    """The calibration with the settings of ``quality`` in the place of None.

    A tuning of 0 epochs is left out.

    Args:
        choices: the quantizers; ``balanced`` and ``best`` weight by the loss if one of them wants
            a calibration, and ``best`` tunes if one of them can rescale packed weights.
    """
    if config is None:
        return None
    if quality == "fast":
        config = replace(config, max_samples=FAST_SAMPLES)
    else:
        quantizers = [choice.create() for choice in choices]
        if config.weighting is None and any(each.wants_calibration for each in quantizers):
            config = replace(config, weighting="loss")
        rescales = any(each.spec.rescales for each in quantizers)
        if quality == "best" and config.tuning is None and rescales:
            config = replace(config, tuning=TUNING)
    if config.tuning is not None and config.tuning.epochs == 0:
        config = replace(config, tuning=None)
    return config


def with_quality(
    assignment: Assignment, calibration: CalibrationConfig | None, quality: Quality
) -> tuple[Assignment, CalibrationConfig | None]:
    """Complete the choices of all layers and the calibration. Head and embedding stay as they are.

    Raises: as :func:`choice_of`.
    """
    assignment = assignment.map_choices(lambda choice: choice_of(choice, quality))
    choices = [choice for choice in (assignment.default, *assignment.layers.values()) if choice]
    return assignment, calibration_of(calibration, quality, choices)
