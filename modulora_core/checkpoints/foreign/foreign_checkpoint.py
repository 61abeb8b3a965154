"""Another tool's checkpoint, opened: one of ours whose tensors are converted on request.

:mod:`modulora_core.checkpoints.foreign.reading` makes one of a folder or a file.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from modulora_core.checkpoints.mapped import MappedFiles
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QUANT_METHOD, QuantizationRecord
from modulora_core.errors import CheckpointError, OptionError
from modulora_core.models.formats import ForeignWeight, PartStore
from modulora_core.models.safetensors_store import DTYPE_CODES
from modulora_core.models.sites import LinearSite
from modulora_core.models.source import ModelSource
from modulora_core.models.store import StoredTensor
from modulora_core.spec import PackedWeight, TensorLayout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class ForeignCheckpoint(PackedCheckpoint):
    """Another tool's model of packed weights, known from headers.

    Attributes:
        source: its config, tokenizer and dense parameters.
        config: the config.json that we would write.
    """

    def __init__(
        self, path: Path, source: ModelSource, record: QuantizationRecord, store: ForeignStore
    ) -> None:
        config: dict[str, Any] = json.loads(source.config.to_json_string(use_diff=False))
        config["architectures"] = [type(source.outline).__name__]
        config["quantization_config"] = record.to_json()
        super().__init__(path, source.location.name, config, record, store)
        self.source, self.format = source, str(record.source["format"])

    @property
    @override
    def model(self) -> str:
        return self.source.location.path

    @override
    def transformers_config(self) -> PretrainedConfig:
        return copy.deepcopy(self.source.config)

    @override
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.source.tokenizer()

    @override
    def copy_tokenizer(self, out: Path) -> list[str]:
        return self.source.copy_tokenizer(out)

    @override
    def mapped(self) -> MappedFiles:
        """Raises OptionError: the tensors must be converted."""
        raise OptionError(
            f"mapped: expected a checkpoint of modulora's own format, got {self.format} in "
            f"{self.path}; write it as one with `modulora convert {self.name} OUT --to "
            f"{QUANT_METHOD}`, or leave mapped out"
        )

    @override
    def _dense_outline(self) -> PreTrainedModel:
        return copy.deepcopy(self.source.outline)


Placed = dict[str, tuple[LinearSite, tuple[ForeignWeight, ...]]]
"""Each packed parameter by its name in memory, in the model's order. The files have it as one
weight, which may be a stack of experts, or as a weight for each expert."""


class ForeignStore:
    """The tensors of a foreign folder, named and packed as in a checkpoint of ours.

    Callers read the tensors of a packed weight in a row, so the last weight is cached.
    """

    def __init__(
        self,
        source: ModelSource,
        raw: PartStore,
        record: QuantizationRecord,
        placed: Placed,
    ) -> None:
        self._source, self._raw, self._placed = source, raw, placed
        self._owners: dict[str, tuple[str, str, str]] = {}
        self._last: tuple[str, PackedWeight] | None = None
        self.tensors: dict[str, StoredTensor] = {}
        for name, info in source.parameters.items():
            if name not in placed:
                layout = TensorLayout(str(info.dtype).removeprefix("torch."), info.shape)
                self.tensors[name] = _stored(layout, source.location.folder.name)
        for parameter, site in record.items():
            file = raw.tensors[placed[parameter][1][0].tensors[0]].file
            for name, layout in site.tensors(parameter):
                self.tensors[name] = _stored(layout, file)
                matrix, _, part = name.rpartition(".")
                self._owners[name] = parameter, matrix, part

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError if a file was changed meanwhile, or is damaged."""
        if name not in self._owners:
            ((_, tensor),) = self._source.tensors(names=[name])
            return tensor
        parameter, matrix, part = self._owners[name]
        if self._last is None or self._last[0] != matrix:
            self._last = None  # two layers never exist together
            self._last = matrix, self._unpack(parameter, matrix)
        return self._last[1].tensors[part]

    def _unpack(self, parameter: str, matrix: str) -> PackedWeight:
        site, weights = self._placed[parameter]
        index = int(matrix.rpartition(".")[2]) if site.experts else 0
        weight = weights[index] if len(weights) > 1 else weights[0]
        part = partial(self._raw.read_part, index=index)
        packed = weight.unpack(self._raw.read if weight.experts is None else part)
        if packed.layout != weight.layout:
            raise CheckpointError(
                f"{parameter}: expected {weight.layout} by its headers, got {packed.layout}; "
                f"report it to the authors of the plugin of {packed.quantizer}"
            )
        return packed


def _stored(layout: TensorLayout, file: str) -> StoredTensor:
    dtype = getattr(torch, layout.dtype)
    return StoredTensor(layout.shape, dtype, DTYPE_CODES[layout.dtype], layout.nbytes, file)
