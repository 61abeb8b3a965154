"""The calibration samples: which text, how much of it, and what a checkpoint's record says of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from modulora_core.calibration.tuning_config import TuningConfig
from modulora_core.data import token_segments
from modulora_core.errors import DataError, OptionError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SAMPLES = 128
"""As Frantar et al. 2022 (arXiv 2210.17323), section 5."""

SEQ_LEN = 512
"""The paper has 2048, for which small texts are too short; with a quarter of it calibration takes a quarter of the time."""

BATCH_TOKENS = 4096
"""Tokens that go through a block at once: enough for efficient products, few enough for the activations to stay small."""


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """What to calibrate with.

    Attributes:
        source: the text, as in :mod:`modulora_core.data.sources`.
        samples: number of segments, picked at random from the text; None for :data:`SAMPLES`, or all that a shorter
            text has.
        seq_len: tokens in a segment.
        sequential: within a block, each layer sees the outputs of the quantized layers before it
            ("true-sequential"); otherwise all layers of a block see those of its dense weights.
        batch_size: segments that go through a block at once; None for about :data:`BATCH_TOKENS` tokens. It changes
            rounding only.
        spill: keep hidden states in a file beside the output instead of in memory; None decides by their size.
        tuning: tune each block after it was quantized (:mod:`modulora_core.calibration.tuning`); None doesn't.

    Raises:
        OptionError: a number is less than 1.
    """

    source: str
    samples: int | None = None
    seq_len: int = SEQ_LEN
    sequential: bool = True
    batch_size: int | None = None
    spill: bool | None = None
    tuning: TuningConfig | None = None

    def __post_init__(self) -> None:
        if self.tuning is not None and self.tuning.epochs == 0:
            object.__setattr__(self, "tuning", None)
        for name in ("samples", "seq_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"calibration {name}: expected at least 1, got {value}")


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The samples, int64 ``[samples, seq_len]``, and how they go through the model."""

    config: CalibrationConfig
    ids: Tensor

    @property
    def batch_size(self) -> int:
        """Segments in a batch."""
        return self.config.batch_size or max(1, BATCH_TOKENS // self.ids.shape[1])

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint's record. Two runs with equal records have had the same samples in the same way."""
        tuning = self.config.tuning
        return {
            "source": self.config.source,
            "samples": self.ids.shape[0],
            "seq_len": self.ids.shape[1],
            "sequential": self.config.sequential,
            "batch_size": self.batch_size,
            "tokens_sha256": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
            **({} if tuning is None else {"tuning": tuning.to_json(self.ids.shape[1])}),
        }


def check_seq_len(config: CalibrationConfig, model: PretrainedConfig) -> None:
    """Refuse samples that are longer than the model's context. Raises OptionError."""
    longest = getattr(model.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.seq_len > longest:
        raise OptionError(
            f"calibration seq_len: expected at most {longest}, the context of this model, got {config.seq_len}"
        )


def load_calibration(config: CalibrationConfig, tokenizer: Any, *, seed: int) -> CalibrationText:
    """Tokenize the text and pick the samples.

    Raises:
        DataError: the text is missing or malformed, has fewer than ``config.samples`` segments, or one only where
            there is tuning.
        MissingExtraError: reading it takes a library that isn't installed.
    """
    ids = token_segments(
        config.source, tokenizer, config.seq_len, config.samples or SAMPLES, seed=seed
    )
    if config.samples is not None and len(ids) < config.samples:
        raise DataError(
            f"calibration {config.source}: expected text for {config.samples} samples of {config.seq_len} tokens, got enough "
            f"for {len(ids)}; give more text, fewer samples, or shorter ones (seq_len)"
        )
    if config.tuning is not None:
        config.tuning.batches(*ids.shape)  # refuses too few samples before any work
    return CalibrationText(config, ids)
