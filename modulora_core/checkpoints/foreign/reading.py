"""Read a folder or a file that another tool quantized, as if we had written it.

:func:`packed_in_folder` reads config, headers, and the few small tensors that layouts need. Large
tensors are converted a layer at a time, on request, so that nothing here is as large as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign.foreign_checkpoint import (
    ForeignCheckpoint,
    ForeignStore,
    Placed,
)
from modulora_core.checkpoints.foreign.parts import joined_experts, whole_layers
from modulora_core.checkpoints.packed_checkpoint import layout_of
from modulora_core.checkpoints.record import QuantizationRecord, Recipe, distinct_sites
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.config import read_config
from modulora_core.models.conversion import build_skeleton, plan_conversions, tied_names, untied
from modulora_core.models.formats import ForeignWeight, PartStore
from modulora_core.models.installed_formats import Recognised
from modulora_core.models.locate import Location
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.sites import find_sites, input_table
from modulora_core.models.source import ModelSource, source_with
from modulora_core.models.store import StoredTensor
from modulora_core.packed import BITS_OF_DTYPE
from modulora_core.progress import quiet
from modulora_core.version import VERSION

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def packed_in_folder(location: Location, recognised: Recognised) -> ForeignCheckpoint:
    """The packed weights of a folder that another tool quantized, with its dense ones.

    Raises:
        ModelError: the format can't read it, or a quantized layer isn't a linear layer of its own
            in the model that transformers makes of config.json.
        CheckpointError: missing, truncated or damaged files, or tensors that don't fit config.json.
        PluginError: the plugin can't be used.
    """
    with quiet():
        config, values = read_config(location.folder, recognised.spec)
        raw = SafetensorsStore(location.folder)
        packable = [(n, t) for n, t in raw.tensors.items() if _dtype_name(t) in BITS_OF_DTYPE]
        layouts = {name: layout_of(tensor) for name, tensor in packable}
        reader = recognised.reader()
        weights = dict(reader.weights(recognised.config, layouts, raw.read))
        if not weights:
            raise CheckpointError(
                f"{location.folder}: {recognised.file} says that it is quantized in the format "
                f"{recognised.spec.name}, and no tensor of its files is"
            )
        skeleton = build_skeleton(config, torch.float32)
        headers = _Headers(raw, whole_layers(weights, reader.parts, skeleton, raw.tensors))
        placed = _place(location.model, config, skeleton, headers)
        source = source_with(location, config, values, headers)
        source.check_whole()
        return _checkpoint(location.folder, source, raw, placed, recognised.spec.name)


def packed_in_file(source: ModelSource) -> ForeignCheckpoint | None:
    """The packed weights of a model in one file, with its dense ones; None if it has none.

    Raises:
        CheckpointError: tensors that don't fit the model.
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
        return _checkpoint(found.path, source, packed.store, placed, found.format.spec.name)


def _checkpoint(
    path: Path, source: ModelSource, raw: PartStore, placed: Placed, format_name: str
) -> ForeignCheckpoint:
    record = _record(source, placed, format_name)
    return ForeignCheckpoint(path, source, record, ForeignStore(source, raw, record, placed))


class _Headers:
    """The tensors of a foreign folder; each packed weight is one tensor, ``MODULE.weight``.

    :class:`~modulora_core.models.weights.Weights` maps them to names in memory. Packed weights
    aren't read through it.
    """

    def __init__(self, raw: SafetensorsStore, weights: Mapping[str, ForeignWeight]) -> None:
        self._raw = raw
        self.packed = {
            module if weight.experts else f"{module}.weight": weight
            for module, weight in weights.items()
        }
        parts = {part for weight in weights.values() for part in weight.tensors}
        self.tensors = {name: t for name, t in raw.tensors.items() if name not in parts}
        for name, weight in self.packed.items():
            if name in self.tensors:
                other = weight.tensors[0]
                raise CheckpointError(f"{name}: the files have it, and {other} of the same layer")
            self.set_shape(name, weight.layout.shape)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of a packed weight, or of each matrix of a stack, in the model's code."""
        weight = self.packed[name]
        parts = [self._raw.tensors[part] for part in weight.tensors]
        nbytes, file = sum(tensor.nbytes for tensor in parts), parts[0].file
        whole = shape if weight.experts is None else (weight.experts, *shape)
        self.tensors[name] = StoredTensor(whole, torch.float16, "packed", nbytes, file)

    def cut(self, name: str, shape: tuple[int, int]) -> ForeignWeight:
        """A packed weight, and its bias, without the rows and columns that pad it in the files."""
        weight = self.packed[name]
        if weight.cut is None or weight.layout.shape == shape:
            return weight
        padded, weight = weight.layout.shape[0], weight.cut(shape)
        self.packed[name] = weight
        self.set_shape(name, shape)
        bias = self.tensors.get(of_bias := f"{name.removesuffix('.weight')}.bias")
        if bias is not None and bias.shape == (padded,):
            self.tensors[of_bias] = replace(bias, shape=shape[:1])
        return weight

    def read(self, name: str) -> Tensor:
        """Read a dense tensor."""
        tensor, shape = self._raw.read(name), self.tensors[name].shape
        return tensor if tensor.shape == shape else tensor[: shape[0]]


def _place(
    model: str, config: PretrainedConfig, skeleton: PreTrainedModel, headers: _Headers
) -> Placed:
    """Find the layer of each packed weight. If the head is packed, ``config`` becomes untied."""
    kind = type(skeleton).__name__
    conversions, unexpected = plan_conversions(skeleton, headers.tensors)
    _check_unexpected(model, kind, headers, unexpected)
    found = {
        step.target: step
        for step in conversions
        if not headers.packed.keys().isdisjoint(step.names)
    }
    if not found.keys().isdisjoint(tied_names(skeleton)):
        skeleton = build_skeleton(untied(config), torch.float32)
    sites = {site.name: site for site in find_sites(skeleton, include=["*"]).linears}
    placed: Placed = {}
    for target, step in found.items():
        site, name = sites.get(target), step.names[0]
        weights = {name: headers.packed[name] for name in step.names if name in headers.packed}
        if site is not None and len(weights) == len(step.names):
            if step.rule is not None and site.experts:
                placed[target] = site, joined_experts(site, step, weights, skeleton)
                continue
            if step.rule is None and bool(site.experts) == bool(weights[name].experts):
                weight = headers.cut(name, (site.out_features, site.in_features))
                if site.transposed:
                    headers.set_shape(name, weight.layout.shape[::-1])
                placed[target] = site, (weight,)
                continue
        raise ModelError(
            f"{model}: {name.removesuffix('.weight')} is quantized as a layer of its own; in "
            f"transformers' {kind} it is a part of {target}. Such a folder can't be read"
        )
    return placed


def _check_unexpected(model: str, kind: str, headers: _Headers, unexpected: list[str]) -> None:
    """Refuse a packed weight, or the bias of one, that the model has no place for."""
    for name in headers.packed:
        module = name.removesuffix(".weight")
        if name in unexpected:
            raise ModelError(
                f"{model}: {module} is quantized there, and transformers' {kind} has no such layer"
            )
        # some tools write a bias of zeros for layers that have none
        if f"{module}.bias" in unexpected and bool(headers.read(f"{module}.bias").any()):
            raise ModelError(
                f"{module}.bias: the files have a bias that isn't zero, and the layer of the model "
                "has none"
            )


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
    kept: dict[str, list[str]] = {}
    for name, reason in {**found.dense, **dense}.items():
        if name not in weights:
            kept.setdefault(reason, []).append(name)
    return QuantizationRecord(
        core_version=VERSION, source={**source.identity(), "format": format_name},
        recipes=tuple(recipes), sites=sites, weights=weights, kept=kept,
    )  # fmt: skip


def _dtype_name(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
