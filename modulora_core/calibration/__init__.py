"""Computes H = E[xxᵀ] of every layer's inputs, from a model and text, a decoder block at a time.

    text.py             the samples: segments of a text, and their entry in a record
    blocks.py           decoder blocks: found, and filled with values
    calls.py            how the model calls its blocks
    observe.py          dense weights that report their inputs
    moments.py          the running sum of xxᵀ
    states.py           the hidden states of the samples, in memory or in a mapped file
    stages.py           the order of a block's weights, and the sum of H over a stage's inputs
    passes.py           batches on their way through one block, stopped after each stage's inputs
    visitor.py          the interface to the code that packs a block
    walk.py             the samples' way through all blocks
    tuning.py           training a quantized block's vectors towards the dense block
    sensitivity.py      how much the loss depends on errors in each layer
    gradients.py        the sums of the gradients in one layer's outputs
    token_weights.py    weights of the tokens by the loss, in a file
    output_moments.py   second moments of the gradients in a layer's outputs, in files

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
