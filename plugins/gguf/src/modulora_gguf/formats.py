"""Open a GGUF file as a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modulora_core.errors import ModelError
from modulora_core.models.formats import ModelFile, PackedTensors
from modulora_core.models.sites import LinearSite
from modulora_core.models.weights import Weights
from modulora_gguf.file.config import gguf_config
from modulora_gguf.file.model_header import read_model_header
from modulora_gguf.file.rows import packed_rows
from modulora_gguf.file.store import GGUFStore, dtype_of, weight_transforms
from modulora_gguf.file.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_HARMLESS = re.compile(
    r".*\.input_scale|(.*\.)?(rope_(freqs|factors_long|factors_short)|attn_rot_embd)\..*"
)
"""Tensors that become numbers of the config, and scales of quantized activations."""


class GGUFModel(ModelFile):
    """A GGUF file whose header is parsed."""

    def __init__(self, path: Path) -> None:
        self._header = header = read_model_header(path)
        self.config, self._values = gguf_config(header)
        self.dtype = dtype_of(header)
        stored = {info.name: [info.type, info.shape] for info in header.tensors}
        self.description = {"architecture": header.architecture, "tensors": stored}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._header)

    def tensors(self, model: PreTrainedModel) -> GGUFStore:
        return GGUFStore(self._header, model, self._values)

    def transforms(self, model: PreTrainedModel) -> list[Any] | None:
        return weight_transforms(self._header.architecture, model.config)

    def check_unplaced(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        left_out = tuple(name for name in names if not _HARMLESS.fullmatch(name))
        for name in left_out:
            if name.endswith(".scale"):  # without it some weight would be another one
                raise ModelError(
                    f"{self._header.path}: {name}: expected the factor of a weight, found no weight"
                )
        _warn_left_out(str(self._header.path), type(model).__name__, left_out)

    def packed(self, source: Weights, sites: Iterable[LinearSite]) -> PackedTensors:
        return packed_rows(source, sites)


@cache  # a command may open a file several times
def _warn_left_out(path: str, model: str, names: tuple[str, ...]) -> None:
    if names:
        logger.warning(
            "%s: tensors that transformers' %s has no place for are left out (%d): %s%s",
            path, model, len(names), ", ".join(names[:3]), ", ..." if names[3:] else "",
        )  # fmt: skip
