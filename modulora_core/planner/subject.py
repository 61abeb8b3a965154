"""The model that a plan is about: known from a config alone, packed or to be packed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modulora_core import registry
from modulora_core.calibration import find_blocks
from modulora_core.checkpoints.checkpoint import check_mapped, open_checkpoint
from modulora_core.checkpoints.hf_quantizer import install
from modulora_core.checkpoints.record import QUANT_METHOD, PackedSite, QuantizationRecord, Recipe
from modulora_core.errors import ModelError
from modulora_core.models import open_model
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.ends import find_ends
from modulora_core.models.formats import recognise
from modulora_core.models.locate import locate
from modulora_core.models.quiet import quiet
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.quantization.layout import choice_of_end, layout_of
from modulora_core.registry import Choice
from modulora_core.spec import PackedLayout, Quantizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Dense:
    """A model that isn't packed.

    Attributes:
        name: MODEL.
        config: transformers' config, whose dtype is the one that the model is stored in.
        linears: the linear weights that are packed by default.
        blocks: the dotted path of the list of decoder blocks.
    """

    name: str
    config: PretrainedConfig
    linears: tuple[LinearSite, ...]
    blocks: str

    def packed_by(
        self, quantizer: Quantizer, head: Choice | None = None, embeddings: Choice | None = None
    ) -> Subject:
        """What ``modulora quantize`` would make of it.

        Args:
            head, embeddings: quantizers for the two ends, which stay dense without (:func:`modulora_core.models.ends.find_ends`).

        Raises:
            ShapeError: a quantizer can't pack a layer; the message names the layer.
            PluginError, OptionError: an end can't be packed, or not by what was asked for.
        """
        with quiet():
            skeleton = build_skeleton(self.config, self.config.dtype or torch.float32)
        names = [name for name, _ in skeleton.named_parameters()]
        ends = find_ends(skeleton, head, embeddings, names)
        quantizers = [quantizer]
        chosen = {end.site.name: choice_of_end(end, quantizers) for end in ends}
        others = [linear for linear in self.linears if linear.name not in chosen]
        linears = [*others, *(end.site for end in ends)]
        sites, weights = _sites(linears, quantizers, chosen)
        record = QuantizationRecord(tuple(map(Recipe.of, quantizers)), sites, weights)
        return Subject(self.name, self.config, record, tuple(quantizers), self.blocks)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and how it is packed.

    Attributes:
        config: of the model, without quantization.
        record: which parameter is packed, and how its tensors look.
        quantizers: for each of the record's recipes.
        blocks: the dotted path of the list of decoder blocks.
        foreign: whether another tool packed it, in its own format, whose weights can't be mapped.
    """

    name: str
    config: PretrainedConfig
    record: QuantizationRecord
    quantizers: tuple[Quantizer, ...]
    blocks: str
    foreign: bool = False

    def skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """A new model on the meta device with packed modules; all else in ``dtype``."""
        with quiet():
            model = build_skeleton(self.config, dtype)
        install(model, self.record)
        return model

    def block_of(self, parameter: str) -> str:
        """The path of the decoder block that has a parameter; empty where none has it."""
        if not parameter.startswith(f"{self.blocks}."):
            return ""
        number = parameter.removeprefix(f"{self.blocks}.").partition(".")[0]
        return f"{self.blocks}.{number}"


def open_subject(
    model: str, revision: str | None = None, *, mapped: bool = False
) -> Dense | Subject:
    """Find MODEL and read what is known without its weights.

    Args:
        mapped: whether a run is planned that maps its weights.

    Raises:
        OptionError: ``mapped``, and the model is packed in another tool's format.
        ModelError: nothing is there, it can't be used, or it has no decoder blocks.
        PluginError: what packed it isn't installed. CheckpointError: its record is malformed.
    """
    location = locate(model, revision)
    values = {} if location.gguf is not None else _config_values(location.folder)
    if dict(values.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:
        return _packed_here(model, location.folder, values)
    if location.gguf is None and recognise(location.folder, values) is not None:
        return _foreign(model, revision, mapped=mapped)
    source = open_model(model, revision=revision, weights=False)
    skeleton = source.skeleton()
    return Dense(model, source.config, find_sites(skeleton).linears, _list_of_blocks(skeleton))


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # opening it as a model says what is wrong
        return {}
    return values if isinstance(values, dict) else {}


def _packed_here(model: str, folder: Path, values: dict[str, Any]) -> Subject:
    from transformers import AutoConfig

    record = QuantizationRecord.from_json(values["quantization_config"])
    quantizers = tuple(recipe.create() for recipe in record.recipes)
    for site in record.sites:
        quantizers[site.recipe].check_format(site.layout)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class checks its fields in its own way
        raise ModelError(
            f"{folder}: transformers can't use its config.json: {str(error).splitlines()[0]}"
        ) from error
    config = deepcopy(config)
    del config.quantization_config
    return Subject(model, config, record, quantizers, _list_of_blocks(_dense_skeleton(config)))


def _foreign(model: str, revision: str | None, *, mapped: bool) -> Subject:
    checkpoint = open_checkpoint(model, revision=revision)
    if mapped:
        check_mapped(checkpoint, "cpu")  # a request for another device was refused
    assert checkpoint.foreign is not None
    config = checkpoint.foreign.source.config
    quantizers = tuple(recipe.create() for recipe in checkpoint.record.recipes)
    blocks = _list_of_blocks(_dense_skeleton(config))
    return Subject(model, config, checkpoint.record, quantizers, blocks, foreign=True)


def _dense_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with quiet():
        return build_skeleton(config, config.dtype or torch.float32)


def _list_of_blocks(skeleton: PreTrainedModel) -> str:
    return find_blocks(skeleton)[0].rpartition(".")[0]


def _sites(
    linears: Sequence[LinearSite], quantizers: Sequence[Quantizer], chosen: Mapping[str, int]
) -> tuple[tuple[PackedSite, ...], dict[str, int]]:
    """Each kind of packed parameter once, and the kind of every parameter; what isn't ``chosen`` is packed by the first quantizer."""
    layouts: dict[tuple[int, tuple[int, int]], PackedLayout] = {}
    kinds: dict[PackedKind, int] = {}
    sites: list[PackedSite] = []
    weights: dict[str, int] = {}
    for linear in linears:
        recipe, shape = chosen.get(linear.name, 0), (linear.out_features, linear.in_features)
        if (recipe, shape) not in layouts:
            layouts[recipe, shape] = layout_of(quantizers[recipe], shape, linear)
        kind = (recipe, shape, linear.kind, linear.experts, linear.transposed)
        if kind not in kinds:
            kinds[kind] = len(sites)
            site = PackedSite(
                recipe, layouts[recipe, shape], linear.kind, linear.experts, linear.transposed
            )
            sites.append(site)
        weights[linear.name] = kinds[kind]
    return tuple(sites), weights


PackedKind = tuple[int, tuple[int, int], str, int | None, bool]


def create(name: str, options: Mapping[str, Any]) -> Quantizer:
    """The quantizer called ``name``. Raises PluginError, OptionError."""
    return registry.create(name, options)


def configurations() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every installed quantizer that can be used, with each configuration that it makes promises for."""
    for entry in registry.entries():
        if entry.status == "ok" and entry.spec is not None:
            promised = [promise.options for promise in entry.spec.promises] or [{}]
            for options in promised:
                yield entry.name, options
