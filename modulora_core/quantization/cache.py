"""Quantize a dense model into a cache folder, once.

The folder is ``$MODULORA_CACHE``, else ``modulora`` beside the Hub's own cache (``$HF_HOME``). A
model's name in it has a hash of its files, the quantizer and the options.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.constants import HF_HOME

from modulora_core import registry
from modulora_core.calibration import CalibrationConfig, calibration_text
from modulora_core.checkpoints.opening import is_packed, open_packed
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.models import open_dense
from modulora_core.progress import Progress, no_progress
from modulora_core.quantization.assignment import Assignment
from modulora_core.quantization.layout import choose_layout
from modulora_core.quantization.quality import Quality, with_quality
from modulora_core.quantization.quantize import QuantizeResult, quantize
from modulora_core.registry import Choice

CACHE_VARIABLE = "MODULORA_CACHE"

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder of all cached models."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path(HF_HOME) / "modulora").expanduser()


class CachedModel:
    """A packed model in the cache, or to be made there; the dense model's headers tell its record.

    Args:
        choice, embeddings, calibration, quality: as for :func:`quantize`, whose other settings
            have their defaults.

    Attributes:
        record: the ``quantization_config`` that the packed model will have, without ``contents``.

    Raises ModelError, CheckpointError, PluginError, OptionError.
    """

    def __init__(
        self,
        model: str,
        choice: Choice,
        *,
        embeddings: Choice | None = None,
        calibration: CalibrationConfig | None = None,
        quality: Quality = "balanced",
        cache: Path | None = None,
    ) -> None:
        # what was asked for, as quantize takes it: it resolves the quality by itself
        self._choice, self._calibration, self._quality = choice, calibration, quality
        self._embeddings, self._cache = embeddings, cache
        assignment = Assignment(default=choice, embeddings=embeddings)
        resolved, config = with_quality(assignment, calibration, quality)
        self._source = open_dense(model)
        text = None if config is None else calibration_text(self._source, config, seed=0)
        layout = choose_layout(self._source, resolved, calibration=text, seed=0)
        self.record: QuantizationRecord = layout.record

    def transformers_config(self) -> PretrainedConfig:
        """The dense model's config. Do not change it."""
        return self._source.config

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ModelError."""
        return self._source.tokenizer()

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The packed model on the meta device. Do not change it.

        Raises: as :attr:`PackedCheckpoint.outline`.
        """
        from modulora_core.checkpoints.packed_modules import install  # slow to import

        model = self._source.skeleton()
        install(model, self.record)
        return model

    @cached_property
    def folder(self) -> Path:
        """The packed model's folder in the cache; it need not exist."""
        described = {
            **self._source.file_stats(),
            "plugin": registry.find(self._choice.quantizer).version,
            "record": self.record.to_json(),
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        name = self._source.location.name.replace("/", "--").replace(":", "-")
        return (self._cache or cache_folder()) / f"{name}-{self._choice.quantizer}-{digest}"

    def packed(self, progress: Progress = no_progress) -> PackedCheckpoint:
        """Open the packed model; quantize it first if it is not in the cache.

        Raises: as :meth:`quantize`.
        """
        if not is_packed(self.folder):
            self.quantize(progress)
        return open_packed(self.folder)

    def quantize(self, progress: Progress = no_progress) -> QuantizeResult:
        """Quantize the model into the cache. A killed quantization is continued.

        If the model is there already, the result has 0 seconds.

        Raises:
            OutputError, DiskSpaceError: the cache cannot be written, or another process writes it.
            WeightError, WorkError: the model or the quantizer failed.
        """
        model = self._source.location.model
        if not is_packed(self.folder):
            logger.info("%s: quantizing %s into the cache", self.folder, model)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return quantize(
            model, self.folder, self._choice.quantizer, self._choice.options,
            quality=self._quality, embeddings=self._embeddings, calibration=self._calibration,
            resume=True, progress=progress,
        )  # fmt: skip
