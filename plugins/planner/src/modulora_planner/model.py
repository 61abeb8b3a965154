"""Open the model of a plan, from its config alone: packed, or dense and packed on paper."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modulora_core.calibration import find_blocks
from modulora_core.checkpoints.opening import open_model, own_record
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.packed_modules import install
from modulora_core.checkpoints.record import QuantizationRecord, packed_sites
from modulora_core.hf.load_model import check_mapped
from modulora_core.models.config import (
    config_values,
    read_config,
    transformers_config,
    window_of,
)
from modulora_core.models.ends import find_ends
from modulora_core.models.installed_formats import recognise
from modulora_core.models.locate import Location, locate
from modulora_core.models.sites import find_sites
from modulora_core.models.skeleton import build_skeleton
from modulora_core.models.source import ModelSource, load_dtype, open_dense
from modulora_core.progress import quiet
from modulora_core.quantization.layout import end_quantizer
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer
from modulora_planner.dense_weights import NONE, DenseWeights, recipe_of
from modulora_planner.request import PlanRequest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense model, known from its config.

    Attributes:
        name: MODEL.
        config: transformers' config; ``config.dtype`` is the stored dtype.
    """

    name: str
    config: PretrainedConfig
    _outlines: dict[torch.dtype, PreTrainedModel] = field(default_factory=dict)

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.config.dtype or torch.float32

    @property
    def window(self) -> int | None:
        """The longest sequence that the model takes; None where the config says nothing."""
        return window_of(self.config)

    def outline(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model on the meta device, in ``dtype`` or its stored dtype. Do not change it."""
        dtype = dtype or self.stored_dtype
        if dtype not in self._outlines:
            self._outlines[dtype] = self.skeleton(dtype)
        return self._outlines[dtype]

    def skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """Build the model on the meta device, in ``dtype``."""
        with quiet():
            return build_skeleton(self.config, dtype)

    def packed_by(
        self,
        quantizer: Choice,
        head: Choice | None = None,
        embeddings: Choice | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> PlannedModel:
        """Lay the packed model out, as ``modulora quantize`` would write it.

        Args:
            quantizer: packs the decoder's linear weights; ``NONE`` leaves them in ``dtype``.
            head, embeddings: pack the output head, the input embedding; None keeps it dense.

        Raises:
            ShapeError: a quantizer cannot pack a layer; the message names the layer.
            PluginError, OptionError: a choice is impossible.
        """
        outline = self.outline()
        quantizers = [DenseWeights(dtype) if quantizer == NONE else quantizer.create()]
        ends = find_ends(
            outline, head, embeddings, [name for name, _ in outline.named_parameters()]
        )
        of_ends: dict[str, int] = {}
        for end in ends:
            wanted = end_quantizer(end)
            known = [(each.spec.name, each.options) for each in quantizers]
            if (wanted.spec.name, wanted.options) not in known:
                quantizers.append(wanted)
                known.append((wanted.spec.name, wanted.options))
            of_ends[end.site.name] = known.index((wanted.spec.name, wanted.options))
        linears = [site for site in find_sites(outline).linears if site.name not in of_ends]
        linears += [end.site for end in ends]
        chosen = {site.name: of_ends.get(site.name, 0) for site in linears}
        sites, weights = packed_sites(linears, quantizers, chosen)
        recipes = tuple(map(recipe_of, quantizers))
        record = QuantizationRecord(recipes=recipes, sites=sites, weights=weights)
        return PlannedModel(self, record, tuple(quantizers))

    def as_asked(self, request: PlanRequest) -> PlannedModel:
        """The packed model of a request with a quantizer. Raises as :meth:`packed_by`."""
        assert request.quantizer is not None
        dtype = getattr(torch, request.dtype)
        return self.packed_by(request.quantizer, request.head, request.embeddings, dtype=dtype)


@dataclass(frozen=True, eq=False)
class PlannedModel:
    """A packed model.

    Attributes:
        dense: the model without quantization.
        record: each packed parameter with its layout.
        quantizers: one for each recipe of ``record``.
        foreign: another tool packed it, in its own format, so its weights cannot be mapped.
    """

    dense: Dense
    record: QuantizationRecord
    quantizers: tuple[Quantizer, ...]
    foreign: bool = False

    @cached_property
    def blocks(self) -> str:
        """The dotted path of the list of decoder blocks. Raises ModelError if there is none."""
        return find_blocks(self.dense.outline())[0].rpartition(".")[0]

    def skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """Build the model on the meta device, with packed weights and the rest in ``dtype``."""
        model = self.dense.skeleton(dtype)
        install(model, self.record, self.quantizers)
        return model

    def block_of(self, parameter: str) -> str:
        """The path of the decoder block of a parameter; empty outside of the blocks."""
        if not parameter.startswith(f"{self.blocks}."):
            return ""
        number = parameter.removeprefix(f"{self.blocks}.").partition(".")[0]
        return f"{self.blocks}.{number}"


def open_planned(request: PlanRequest) -> tuple[PlanRequest, Dense | PlannedModel]:
    """Find MODEL and read its config. By default sequences are no longer than its context.

    Raises:
        OptionError: a foreign format to be mapped, or sequences longer than the model's context.
        ModelError: nothing is there, or it cannot be used.
        PluginError: its quantizer is not installed.
        CheckpointError: its record is malformed.
    """
    found = _open(request)
    dense = found.dense if isinstance(found, PlannedModel) else found
    config = request.config.in_window(dense.window, request.model)
    return replace(request, config=config), found


def _open(request: PlanRequest) -> Dense | PlannedModel:
    """Find MODEL. Neither a checkpoint of ours nor a dense folder needs its weights."""
    name, location = request.model, locate(request.model, request.revision)
    found: PackedCheckpoint | ModelSource
    if location.file is not None:  # a quantizer packs its weights again
        found = open_model(location) if request.quantizer is None else open_dense(location)
    else:
        values = config_values(location.folder)
        record = own_record(location.folder, values)
        if record is not None:
            return _packed(Dense(name, _config(location.folder)), record)
        if recognise(location.folder, values) is None:
            return Dense(name, _dense_config(location))
        found = open_model(location)
    if not isinstance(found, PackedCheckpoint):
        return Dense(name, found.config)
    if request.config.mapped:
        check_mapped(found, "cpu")
    return _packed(Dense(name, found.transformers_config()), found.record, foreign=True)


def _packed(dense: Dense, record: QuantizationRecord, *, foreign: bool = False) -> PlannedModel:
    quantizers = tuple(recipe.create() for recipe in record.recipes)
    for site in record.sites:
        quantizers[site.recipe].check_format(site.layout)
    return PlannedModel(dense, record, quantizers, foreign)


def _dense_config(location: Location) -> PretrainedConfig:
    """The config of a model of safetensors, with the dtype that transformers loads it in.

    The weights need not be there: those of a Hub model are not downloaded.

    Raises:
        ModelError: as :func:`open_dense`.
    """
    with quiet():
        config, _ = read_config(location.folder)
        dtype = load_dtype(config, ())
        config = build_skeleton(config, dtype).config  # refuses other models than language models
    config.name_or_path, config.dtype = location.model, dtype
    return config


def _config(folder: Path) -> PretrainedConfig:
    config = deepcopy(transformers_config(folder))
    del config.quantization_config
    return config
