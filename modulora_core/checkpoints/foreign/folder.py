"""Read a folder that another tool quantized, as if we had written it.

:func:`packed_in_folder` reads config, headers, and the few small tensors that layouts need. Large
tensors are converted a layer at a time, on request, so that nothing here is as large as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign.foreign_checkpoint import ForeignCheckpoint
from modulora_core.checkpoints.foreign.parts import joined_experts, whole_layers
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.config import read_config
from modulora_core.models.conversion import Conversion, plan_conversions
from modulora_core.models.formats import ForeignWeight
from modulora_core.models.installed_formats import Recognised
from modulora_core.models.locate import Location
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.models.skeleton import build_skeleton, tied_names, untie
from modulora_core.models.source import load_dtype, refuse_integers, source_with
from modulora_core.models.store import StoredTensor
from modulora_core.packed import BITS_OF_DTYPE, TensorLayout
from modulora_core.progress import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        layouts = {
            name: TensorLayout.of(tensor)
            for name, tensor in raw.tensors.items()
            if str(tensor.dtype).removeprefix("torch.") in BITS_OF_DTYPE
        }
        reader = recognised.reader()
        weights = dict(reader.weights(recognised.config, layouts, raw.read))
        if not weights:
            raise CheckpointError(
                f"{location.folder}: {recognised.file} says that it is quantized in the format "
                f"{recognised.spec.name}, and no tensor of its files is"
            )
        packed = {part for weight in weights.values() for part in weight.tensors}
        dtype = load_dtype(config, (t for name, t in raw.tensors.items() if name not in packed))
        skeleton = build_skeleton(config, dtype)
        headers = _Headers(raw, whole_layers(weights, reader.parts, skeleton, raw.tensors))
        found = _packed_parameters(location.model, skeleton, headers)
        if not tied_names(skeleton).keys().isdisjoint(each.target for each in found):
            untie(skeleton)  # the head is packed
        sites = {site.name: site for site in find_sites(skeleton, include=["*"]).linears}
        placed = {
            each.target: _fit(location.model, skeleton, each, sites.get(each.target), headers)
            for each in found
        }
        source = source_with(location, skeleton, dtype, values, headers)
        source.check_whole()
        refuse_integers(source)
        return ForeignCheckpoint(source, raw, placed, recognised.spec.name)


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


def _packed_parameters(
    model: str, skeleton: PreTrainedModel, headers: _Headers
) -> list[Conversion]:
    """The parameters that packed weights become, in the model's order."""
    conversions, unexpected = plan_conversions(skeleton, headers.tensors)
    _check_unexpected(model, type(skeleton).__name__, headers, unexpected)
    return [each for each in conversions if not headers.packed.keys().isdisjoint(each.names)]


def _fit(
    model: str,
    skeleton: PreTrainedModel,
    conversion: Conversion,
    site: LinearSite | None,
    headers: _Headers,
) -> tuple[LinearSite, tuple[ForeignWeight, ...]]:
    """The layer of a packed parameter and its weights; in ``headers`` they get the layer's shape.

    Raises:
        ModelError: the files pack a part of the parameter, which is no layer.
    """
    name = conversion.names[0]
    weights = {name: headers.packed[name] for name in conversion.names if name in headers.packed}
    if site is not None and len(weights) == len(conversion.names):
        if conversion.rule is not None and site.experts:
            return site, joined_experts(site, conversion, weights, skeleton)
        if conversion.rule is None and bool(site.experts) == bool(weights[name].experts):
            weight = headers.cut(name, (site.out_features, site.in_features))
            if site.transposed:
                headers.set_shape(name, weight.layout.shape[::-1])
            return site, (weight,)
    raise ModelError(
        f"{model}: {name.removesuffix('.weight')} is quantized as a layer of its own; in "
        f"transformers' {type(skeleton).__name__} it is a part of {conversion.target}. Such a "
        "folder can't be read"
    )


def _check_unexpected(model: str, kind: str, headers: _Headers, unexpected: list[str]) -> None:
    """Refuse tensors that nobody would read. Raises ModelError, CheckpointError."""
    for name in unexpected:
        module = name.removesuffix(".weight").removesuffix(".bias")
        if name in headers.packed:
            raise ModelError(
                f"{model}: {module} is quantized there, and transformers' {kind} has no such layer"
            )
        if name != f"{module}.bias" or f"{module}.weight" not in headers.packed:
            raise CheckpointError(
                f"{model}: {name}: expected a tensor that {kind} or the format reads, got one that "
                "neither knows, which would be left out; quantize the original model"
            )
        # some tools write a bias of zeros for layers that have none
        if bool(headers.read(name).any()):
            raise ModelError(
                f"{name}: the files have a bias that isn't zero, and the layer of the model has "
                "none"
            )
