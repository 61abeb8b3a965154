"""Picks the calibration samples from a text, and describes them for the checkpoint's record."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from modulora_core.arguments import checked_class
from modulora_core.calibration.tuning import TuningConfig
from modulora_core.data import Source, token_segments
from modulora_core.data.rendering import check_ids
from modulora_core.data.sources import source_name
from modulora_core.errors import DataError, OptionError
from modulora_core.models.config import vocabulary_of, window_of

if TYPE_CHECKING:
    from modulora_core.models import ModelSource

SAMPLES = 128
"""As in Frantar et al. 2022 (arXiv 2210.17323), section 5."""

SEQ_LEN = 512
"""The paper uses 2048. Small texts are too short for that, and 512 takes a quarter of the time."""

Weighting = Literal["none", "loss"]

BATCH_TOKENS = 4096
"""Tokens in a batch: enough for efficient products, few enough for small activations."""


@checked_class
@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """Selects the calibration text, and how it passes through the model.

    Attributes:
        source: files, a Hub dataset, ``pydoc``, or records as dicts
            (:mod:`modulora_core.data.sources`).
        samples: the number of segments, drawn at random from the text; None takes
            ``max_samples``, or all segments of a shorter text.
        seq_len: tokens in a segment.
        sequential: calibrate each layer on the outputs of the quantized layers before it
            ("true-sequential"); False uses the dense layers of the same block.
        batch_size: segments in a batch; None takes about :data:`BATCH_TOKENS` tokens. It changes
            rounding only.
        spill: keep hidden states in a file beside the output; None decides by their size.
        weighting: ``"loss"`` weights each token in H by the gradient of the loss in the layer's
            output, and keeps the second moment of the gradients for quantizers that use it
            (:mod:`modulora_core.calibration.token_weights`); experts stay unweighted.
            ``"none"`` does not; None leaves it to the quality of :func:`modulora_core.quantize`.
        max_samples: see ``samples``.
        tuning: how to tune each block after it was quantized; None does not tune.

    Raises OptionError: a number is less than 1, or an unknown weighting.
    """

    source: Source
    samples: int | None = None
    seq_len: int = SEQ_LEN
    sequential: bool = True
    batch_size: int | None = None
    spill: bool | None = None
    weighting: Weighting | None = None
    max_samples: int = SAMPLES
    tuning: TuningConfig | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_samples", "seq_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"calibration {name}: expected at least 1, got {value}")


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The samples, int64 ``[samples, seq_len]``, and how they pass through the model."""

    config: CalibrationConfig
    ids: Tensor

    @property
    def batch_size(self) -> int:
        """Segments in a batch."""
        return self.config.batch_size or max(1, BATCH_TOKENS // self.ids.shape[1])

    def to_json(self) -> dict[str, Any]:
        """The entry in the checkpoint's record. Equal entries mean equal samples and batches."""
        tuning = self.config.tuning
        return {
            "source": source_name(self.config.source),
            "samples": self.ids.shape[0],
            "seq_len": self.ids.shape[1],
            "sequential": self.config.sequential,
            "batch_size": self.batch_size,
            "tokens_sha256": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
            **({"weighting": "loss"} if self.config.weighting == "loss" else {}),
            **({} if tuning is None else {"tuning": tuning.to_json(self.ids.shape[1])}),
        }


def calibration_text(source: ModelSource, config: CalibrationConfig, seed: int) -> CalibrationText:
    """Tokenize the text with the model's tokenizer and draw the samples.

    Raises OptionError, DataError, MissingExtraError, ModelError.
    """
    longest = window_of(source.config)
    if longest is not None and config.seq_len > longest:
        raise OptionError(
            f"calibration seq_len: expected at most {longest}, the context of this model, "
            f"got {config.seq_len}"
        )
    text = load_calibration(config, source.tokenizer(), seed=seed)
    check_ids(
        [int(text.ids.max())],
        vocabulary_of(source.config),
        f"calibration {source_name(config.source)}",
    )
    return text


def load_calibration(config: CalibrationConfig, tokenizer: Any, *, seed: int) -> CalibrationText:
    """Tokenize the text and draw the samples. Raises DataError, MissingExtraError."""
    samples = config.samples or config.max_samples
    ids = token_segments(config.source, tokenizer, config.seq_len, samples, seed=seed)
    if config.samples is not None and len(ids) < config.samples:
        raise DataError(
            f"calibration {source_name(config.source)}: expected text for {config.samples} samples "
            f"of {config.seq_len} tokens, got enough for {len(ids)}; give more text, fewer "
            "samples, or shorter ones (seq_len)"
        )
    if config.tuning is not None:
        config.tuning.batches(*ids.shape)  # refuses too few samples before any work
    return CalibrationText(config, ids)
