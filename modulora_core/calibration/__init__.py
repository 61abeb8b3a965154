"""Computes H = E[xxᵀ] of every layer's inputs, from a model and text, a decoder block at a time.

Frantar et al. 2022 (arXiv 2210.17323, section 4) calibrate like this: the inputs of a block are
the outputs of the quantized blocks before it.
"""

from __future__ import annotations

from modulora_core.calibration.blocks import block_prefixes, find_blocks
from modulora_core.calibration.text import (
    CalibrationConfig,
    CalibrationText,
    calibration_text,
    load_calibration,
)
from modulora_core.calibration.tuning import Tuner, TuningConfig
from modulora_core.calibration.visitor import BlockVisitor, HeldOutCalibration, PackedMatrices
from modulora_core.calibration.walk import BlockWalk

__all__ = [
    "BlockVisitor",
    "BlockWalk",
    "CalibrationConfig",
    "CalibrationText",
    "HeldOutCalibration",
    "PackedMatrices",
    "Tuner",
    "TuningConfig",
    "block_prefixes",
    "calibration_text",
    "find_blocks",
    "load_calibration",
]
