"""Calibration: H = E[xxᵀ] of every layer's inputs, from a model and text, one decoder block in memory at a time.

::

    text.py        the samples: segments of a text, and what a record says of them
    blocks.py      the decoder blocks in a module tree, and what each is called with besides the hidden state
    states.py      the hidden states of the samples, in memory or in a mapped file
    moments.py     the running sum of xxᵀ
    observe.py     a dense weight that tells what it is multiplied by
    order.py       in which order a block uses its weights, and which share an input
    walk.py        the samples' way through the blocks
    tuning.py      training a quantized block's vectors towards the dense block; tuning_config.py says how

Frantar et al. 2022 (arXiv 2210.17323), section 4, calibrate this way: the inputs of a block are those that the
quantized blocks before it give.
"""

from __future__ import annotations

from modulora_core.calibration.blocks import find_blocks
from modulora_core.calibration.states import spill_bytes
from modulora_core.calibration.text import (
    CalibrationConfig,
    CalibrationText,
    check_seq_len,
    load_calibration,
)
from modulora_core.calibration.tuning import Tuner
from modulora_core.calibration.tuning_config import TuningConfig
from modulora_core.calibration.walk import BlockWalk, HeldOutCalibration

__all__ = [
    "BlockWalk",
    "CalibrationConfig",
    "CalibrationText",
    "HeldOutCalibration",
    "Tuner",
    "TuningConfig",
    "check_seq_len",
    "find_blocks",
    "load_calibration",
    "spill_bytes",
]
