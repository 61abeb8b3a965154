"""Another tool's checkpoint, opened: one of ours whose tensors are converted on request.

:func:`packed_in_file` makes one of a file, and
:func:`~modulora_core.checkpoints.foreign.folder.packed_in_folder` of a folder.
"""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QuantizationRecord, Recipe, by_reason, distinct_sites
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import ForeignWeight, PartStore
from modulora_core.models.sites import LinearSite, find_sites, input_table
from modulora_core.models.source import ModelSource
from modulora_core.progress import quiet
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_core.version import VERSION

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


Placed = dict[str, tuple[LinearSite, tuple[ForeignWeight, ...]]]
"""Each packed parameter by its name in memory, in the model's order. The files have it as one
weight, which may be a stack of experts, or as a weight for each expert."""


class ForeignCheckpoint(PackedCheckpoint):
    """Another tool's model of packed weights, known from headers.

    Attributes:
        source: its config, tokenizer and dense parameters.
    """

    def __init__(
        self, source: ModelSource, files: PartStore, placed: Placed, format_name: str
    ) -> None:
        record = _record(source, placed, format_name)
        config: dict[str, Any] = json.loads(source.config.to_json_string(use_diff=False))
        config["architectures"] = [type(source.outline).__name__]
        config["quantization_config"] = record.to_json()
        store = ForeignStore(source, files, record, placed)
        super().__init__(source.location, config, record, store)
        self.source, self.format = source, format_name

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
    def _dense_outline(self) -> PreTrainedModel:
        """The source's, which becomes packed: nothing needs its dense layers any more."""
        model = self.source.outline
        model.config = copy.deepcopy(model.config)  # it gets the record
        return model


def packed_in_file(source: ModelSource) -> ForeignCheckpoint | None:
    """The packed weights of a model in one file, with its dense ones; None if it has none.

    Raises CheckpointError: tensors that don't fit the model.
    """
    file, found = source.file, source.location.file
    if file is None or found is None:
        return None
    with quiet():
        source.check_whole()
        sites = [*find_sites(source.outline, include=["*"]).linears]
        with suppress(ModelError):  # a table that can't be packed stays dense
            sites.append(input_table(source.outline, source.parameters))
        packed = file.packed(source, sites)
        placed: Placed = {
            site.name: (site, (packed.weights[site.name],))
            for site in sites
            if site.name in packed.weights
        }
        if not placed:
            return None
        return ForeignCheckpoint(source, packed.store, placed, found.format.spec.name)


class ForeignStore:
    """The tensors of another tool's folder or file, named and packed as in a checkpoint of ours.

    Callers read the tensors of a packed weight in a row, so the last weight is cached.
    """

    def __init__(
        self, source: ModelSource, files: PartStore, record: QuantizationRecord, placed: Placed
    ) -> None:
        self._source, self._files, self._placed = source, files, placed
        self._owners: dict[str, tuple[str, str, str]] = {}
        self._last: tuple[str, PackedWeight] | None = None
        self.tensors = {
            name: TensorLayout.of(info)
            for name, info in source.parameters.items()
            if name not in placed
        }
        for parameter, site in record.items():
            for name, layout in site.tensors(parameter):
                self.tensors[name] = layout
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
        part = partial(self._files.read_part, index=index)
        packed = weight.unpack(self._files.read if weight.experts is None else part)
        if packed.layout != weight.layout:
            raise CheckpointError(
                f"{parameter}: expected {weight.layout} by its headers, got {packed.layout}; "
                f"report it to the authors of the plugin of {packed.quantizer}"
            )
        return packed


def _record(source: ModelSource, placed: Placed, format_name: str) -> QuantizationRecord:
    """The record of a checkpoint of ours with the weights of ``placed``."""
    # a format makes few quantizers, and Recipe.of looks plugins up
    quantizers = dict.fromkeys(first.quantizer for _, (first, *_) in placed.values())
    recipe_of = {quantizer: Recipe.of(quantizer) for quantizer in quantizers}
    recipes: list[Recipe] = []
    for recipe in recipe_of.values():
        if recipe not in recipes:
            recipes.append(recipe)
    sites, weights = distinct_sites(
        (site, recipes.index(recipe_of[first.quantizer]), first.layout)
        for site, (first, *_) in placed.values()
    )
    found = find_sites(source.outline)
    dense = {site.name: f"not quantized in {source.location.name}" for site in found.linears}
    reasons = {name: why for name, why in {**found.dense, **dense}.items() if name not in weights}
    return QuantizationRecord(
        core_version=VERSION, source={**source.identity(), "format": format_name},
        recipes=tuple(recipes), sites=sites, weights=weights, kept=by_reason(reasons),
    )  # fmt: skip
