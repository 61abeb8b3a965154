"""The format of GGUF files behind the core's hook: opened as models, and written back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modulora_core.adapters.files import AdapterFile, FileWriter, MergedFile
from modulora_core.errors import ModelError
from modulora_core.models.formats import FileFormat, ModelFile, PackedTensors
from modulora_core.models.sites import LinearSite
from modulora_core.models.weights import Weights
from modulora_core.progress import Progress
from modulora_gguf.file.config import gguf_config
from modulora_gguf.file.lora_file import export_for_llama_cpp
from modulora_gguf.file.merging import DEFAULT_TYPE, merge_to_gguf
from modulora_gguf.file.rows import packed_rows
from modulora_gguf.file.store import GGUFStore, read_gguf
from modulora_gguf.file.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_HARMLESS = re.compile(
    r".*\.input_scale|(.*\.)?(rope_(freqs|factors_long|factors_short)|attn_rot_embd)\..*"
)
"""Tensors that become numbers of the config, and scales of quantized activations."""


class GGUFFormat(FileFormat):
    """A whole model in a GGUF file."""

    def open(self, path: Path) -> GGUFModel:
        return GGUFModel(path)


class GGUFModel(ModelFile):
    """A GGUF file whose header is parsed.

    Raises:
        ModelError: the file holds no model, or transformers can't use it.
        CheckpointError: the file is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = read_gguf(path)
        self.config, self._values = gguf_config(path, self._file.header)
        self.dtype = self._file.dtype
        stored = {name: [tensor.kind, tensor.shape] for name, tensor in self._file.tensors.items()}
        self.description = {"architecture": self._file.architecture, "tensors": stored}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._file.path, self._file.header)

    def tensors(self, model: PreTrainedModel) -> GGUFStore:
        return GGUFStore(self._file, model, self._values)

    def check_unplaced(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        left_out = tuple(name for name in names if not _HARMLESS.fullmatch(name))
        for name in left_out:
            if name.endswith(".scale"):  # without it some weight would be another one
                raise ModelError(
                    f"{self._file.path}: {name}: expected the factor of a weight, found no weight"
                )
        _warn_left_out(str(self._file.path), type(model).__name__, left_out)

    def packed(self, source: Weights, sites: Iterable[LinearSite]) -> PackedTensors:
        return packed_rows(source, sites)


class GGUFWriter(FileWriter):
    """LoRA files and merged files of llama.cpp."""

    default_type = DEFAULT_TYPE

    def write_adapter(
        self, adapter: str, out: str | Path, *, model: str | None = None
    ) -> AdapterFile:
        return export_for_llama_cpp(adapter, out, model=model)

    def merge(
        self,
        model: str,
        out: str | Path,
        *,
        adapter: str | None = None,
        type: str | None = None,
        base: str | None = None,
        progress: Progress | Literal[False] | None = None,
    ) -> MergedFile:
        kind = type or self.default_type
        return merge_to_gguf(model, out, adapter=adapter, type=kind, base=base, progress=progress)


@cache  # a command may open a file several times
def _warn_left_out(path: str, model: str, names: tuple[str, ...]) -> None:
    if names:
        logger.warning(
            "%s: tensors that transformers' %s has no place for are left out (%d): %s%s",
            path, model, len(names), ", ".join(names[:3]), ", ..." if names[3:] else "",
        )  # fmt: skip
