"""A foreign folder under our own tensors' names: what another tool quantized, read as a checkpoint of ours.

:func:`open_foreign` reads config, headers and what little the format needs to know layouts. Large tensors are
converted a layer at a time when they are asked for, so nothing here is as large as the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import modulora_core
from modulora_core.checkpoints.record import PackedSite, QuantizationRecord, Recipe
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.config import read_config
from modulora_core.models.conversion import build_skeleton, plan_conversions
from modulora_core.models.formats import ForeignWeight, Recognised
from modulora_core.models.locate import Location
from modulora_core.models.quiet import quiet
from modulora_core.models.safetensors_store import DTYPE_CODES, SafetensorsStore
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.models.source import ModelSource, fit
from modulora_core.models.store import StoredTensor
from modulora_core.packed import BITS_OF_DTYPE
from modulora_core.spec import PackedWeight, TensorLayout

PACKED = "packed"
"""What :class:`_Headers` says a packed weight is stored as."""


@dataclass(frozen=True)
class ForeignModel:
    """A foreign folder.

    Attributes:
        source: its config, tokenizer and dense parameters.
        record: what a checkpoint of ours with these weights has in config.json.
        store: all its tensors, named as in such a checkpoint.
    """

    source: ModelSource
    record: QuantizationRecord
    store: ForeignStore

    def config(self) -> dict[str, Any]:
        """config.json of a checkpoint of ours with these weights."""
        config: dict[str, Any] = json.loads(self.source.config.to_json_string(use_diff=False))
        architectures = [type(self.source.skeleton()).__name__]
        return {
            **config,
            "architectures": architectures,
            "quantization_config": self.record.to_json(),
        }


def open_foreign(location: Location, recognised: Recognised) -> ForeignModel:
    """Open a folder that :func:`modulora_core.models.formats.recognise` knows, its weights being there.

    Raises:
        ModelError: it asks for what can't be read: by the format, or a layer that isn't a linear layer of its own in
            the model that transformers makes of config.json.
        CheckpointError: missing, truncated or damaged files, or tensors that don't fit config.json.
        PluginError: the plugin can't be used.
    """
    with quiet():
        config, values = read_config(location.folder, recognised.spec)
        raw = SafetensorsStore(location.folder)
        layouts = {name: _layout(tensor) for name, tensor in raw.tensors.items() if _known(tensor)}
        weights = recognised.open().weights(recognised.config, layouts, raw.read)
        if not weights:
            raise CheckpointError(f"{location.folder}: {recognised.file} says that it is quantized in the format "
                                  f"{recognised.spec.name}, and no tensor of its files is")  # fmt: skip
        skeleton = build_skeleton(config, torch.float32)
        turned = {site.name for site in find_sites(skeleton).linears if site.transposed}
        plan = plan_conversions(skeleton, _Headers(raw, weights, frozenset()).tensors)
        transposed = {found.names[0] for found in plan.conversions if found.target in turned}
        source = fit(location, config, values, _Headers(raw, weights, transposed))
        placed = _place(source, raw, weights)
        source_record = {**source.identity(), "format": recognised.spec.name}
    record = _record(source, placed, source_record)
    return ForeignModel(
        source, record, ForeignStore(source, raw, record, {n: w for n, (_, w) in placed.items()})
    )


class _Headers:
    """The tensors of a foreign folder with the parts of a packed weight standing as one tensor, ``MODULE.weight``.

    It is what :class:`~modulora_core.models.weights.Weights` maps to names in memory; packed weights aren't read
    through it.
    """

    def __init__(
        self,
        raw: SafetensorsStore,
        weights: Mapping[str, ForeignWeight],
        transposed: frozenset[str] | set[str],
    ) -> None:
        self._raw = raw
        parts = {part for weight in weights.values() for part in weight.tensors}
        tensors = {name: tensor for name, tensor in raw.tensors.items() if name not in parts}
        for module, weight in weights.items():
            name = f"{module}.weight"
            if name in tensors:
                raise CheckpointError(
                    f"{name}: the files have it, and {weight.tensors[0]} of the same layer"
                )
            shape = weight.layout.shape[::-1] if name in transposed else weight.layout.shape
            stored = [raw.tensors[part] for part in weight.tensors]
            tensors[name] = StoredTensor(
                shape, torch.float16, PACKED, sum(t.nbytes for t in stored), stored[0].file
            )
        self._tensors = tensors

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return MappingProxyType(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._raw.read(name)

    def chunks(self, name: str) -> Iterator[Tensor]:
        return self._raw.chunks(name)


class ForeignStore:
    """The tensors of a foreign folder as a checkpoint of ours would have them: a ``TensorStore`` but for chunks.

    The packed tensors of one parameter are asked for one after another: the last that was converted is kept.
    """

    def __init__(
        self,
        source: ModelSource,
        raw: SafetensorsStore,
        record: QuantizationRecord,
        weights: Mapping[str, ForeignWeight],
    ) -> None:
        self._source, self._raw, self._weights = source, raw, weights
        self._owners: dict[str, tuple[str, str]] = {}
        self._last: tuple[str, PackedWeight] | None = None
        tensors: dict[str, StoredTensor] = {}
        for name, info in source.parameters.items():
            if name not in weights:
                dtype = str(info.dtype).removeprefix("torch.")
                tensors[name] = _stored(
                    TensorLayout(dtype, tuple(info.shape)), source.location.folder.name
                )
        for parameter, site in record.items():
            file = raw.tensors[weights[parameter].tensors[0]].file
            for name, layout in site.tensors(parameter):
                tensors[name] = _stored(layout, file)
                self._owners[name] = parameter, name.removeprefix(f"{parameter}.")
        self._tensors = tensors

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return MappingProxyType(self._tensors)

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError when a file was changed meanwhile, or is damaged."""
        if name not in self._owners:
            ((_, tensor),) = self._source.tensors(names=[name])
            return tensor
        parameter, part = self._owners[name]
        if self._last is None or self._last[0] != parameter:
            self._last = None  # two layers never exist together
            self._last = parameter, self._unpack(parameter)
        return self._last[1].tensors[part]

    def _unpack(self, parameter: str) -> PackedWeight:
        weight = self._weights[parameter]
        packed = weight.unpack(self._raw.read)
        if packed.layout != weight.layout:
            raise CheckpointError(f"{parameter}: read as {packed.layout}, and its headers promised {weight.layout}; report it to "
                                  f"the authors of the plugin of {packed.quantizer}")  # fmt: skip
        return packed


def _known(tensor: StoredTensor) -> bool:
    return str(tensor.dtype).removeprefix("torch.") in BITS_OF_DTYPE


def _layout(tensor: StoredTensor) -> TensorLayout:
    return TensorLayout(str(tensor.dtype).removeprefix("torch."), tensor.shape)


def _stored(layout: TensorLayout, file: str) -> StoredTensor:
    return StoredTensor(
        layout.shape, getattr(torch, layout.dtype), DTYPE_CODES[layout.dtype], layout.nbytes, file
    )


def _place(
    source: ModelSource, raw: SafetensorsStore, weights: Mapping[str, ForeignWeight]
) -> dict[str, tuple[LinearSite, ForeignWeight]]:
    """``{name in memory: (its site, its weight)}``, in the model's order."""
    unexpected = set(source.validate())
    for module in weights:
        if f"{module}.weight" in unexpected:
            raise ModelError(f"{source.location.model}: {module} is quantized there, and transformers' "
                             f"{type(source.skeleton()).__name__} has no such layer")  # fmt: skip
        _check_bias(f"{module}.bias", unexpected, raw)
    skeleton = source.skeleton()
    sites = {site.name: site for site in find_sites(skeleton, include=["*"]).linears}
    placed: dict[str, tuple[LinearSite, ForeignWeight]] = {}
    for found in plan_conversions(
        skeleton, _Headers(raw, weights, frozenset()).tensors
    ).conversions:
        modules = [name.removesuffix(".weight") for name in found.names]
        if not any(module in weights for module in modules):
            continue
        site = sites.get(found.target)
        if found.rule is not None or site is None or site.experts is not None:
            raise ModelError(
                f"{source.location.model}: {modules[0]} is quantized as a layer of its own; in transformers' "
                f"{type(skeleton).__name__} it is a part of {found.target}. Such a folder can't be read"
            )
        placed[found.target] = site, weights[modules[0]]
    return placed


def _check_bias(name: str, unexpected: set[str], raw: SafetensorsStore) -> None:
    """Some tools write a bias of zeros for layers that have none. One with values can't be left out."""
    if name in unexpected and bool(raw.read(name).any()):
        raise ModelError(
            f"{name}: the files have a bias that isn't zero, and the layer of the model has none"
        )


def _record(
    source: ModelSource,
    placed: Mapping[str, tuple[LinearSite, ForeignWeight]],
    identity: Mapping[str, Any],
) -> QuantizationRecord:
    recipes: list[Recipe] = []
    sites: list[PackedSite] = []
    weights: dict[str, int] = {}
    known: dict[
        int, int
    ] = {}  # id of a quantizer → its recipe: a format makes few, and Recipe.of looks plugins up
    for name, (linear, weight) in placed.items():
        if id(weight.quantizer) not in known:
            recipe = Recipe.of(weight.quantizer)
            if recipe not in recipes:
                recipes.append(recipe)
            known[id(weight.quantizer)] = recipes.index(recipe)
        site = PackedSite(
            known[id(weight.quantizer)], weight.layout, linear.kind, None, linear.transposed
        )
        if site not in sites:
            sites.append(site)
        weights[name] = sites.index(site)
    found = find_sites(source.skeleton())
    reasons = dict(found.kept) | {
        site.name: f"not quantized in {source.location.name}" for site in found.linears
    }
    kept: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if name not in weights:
            kept.setdefault(reason, []).append(name)
    return QuantizationRecord(
        tuple(recipes),
        tuple(sites),
        weights,
        kept=kept,
        source=identity,
        core_version=modulora_core.__version__,
    )
