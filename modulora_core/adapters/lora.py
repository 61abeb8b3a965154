"""Put LoRA adapters on a model with packed linear layers.

    y = x Ŵᵀ + s (x Aᵀ) Bᵀ      s = α / r      A : [r, in], random      B : [out, r], zero at first

:func:`add_lora` replaces each selected layer by a LoRALinear, each stack of fused experts by
LoRAExperts, and freezes everything else. An adapter may also train channel scales u [in] and v
[out] of linear layers, which start at one. They replace Ŵ by diag(v) Ŵ diag(u).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modulora_core.adapters.experts import LoRAExperts
from modulora_core.adapters.targets import ALL_LINEAR, select_layers
from modulora_core.arguments import check_fields, checked
from modulora_core.checkpoints.packed_model import with_methods
from modulora_core.checkpoints.packed_table import TiedHead
from modulora_core.checkpoints.publishing import upload
from modulora_core.errors import AdapterError, ModelError, OptionError
from modulora_core.layers import LoRALayer, LoRALinear, PackedStack, QuantLinear


@dataclass(frozen=True, slots=True)
class LoRASettings:
    """Settings of a new adapter. The defaults are the paper's (arXiv 2309.16119), except targets.

    Attributes:
        rank: r.
        alpha: α; the adapter is scaled by α / r.
        dropout: probability that training leaves out an entry of the adapter's input.
        targets: ``"all-linear"``, ``"attention"``, ``"experts"`` or names of layers, one or several
            (:mod:`modulora_core.adapters.targets`).
        seed: seed of A's random values.
        train_scales: also train channel scales of linear layers.

    Raises:
        OptionError: a value is out of range.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: str | Sequence[str] = ALL_LINEAR
    seed: int = 0
    train_scales: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name, is_valid, expected in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "more than 0"),
            ("dropout", 0 <= self.dropout < 1, "a probability in [0, 1)"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2³² − 1"),
            ("targets", bool(self.targets), f"{ALL_LINEAR!r} or names of layers"),
        ):
            if not is_valid:
                raise OptionError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


@checked
def add_lora(
    model: nn.Module, settings: LoRASettings | None = None, name: str = "default"
) -> list[str]:
    """Put a new adapter on ``model``'s packed layers, in place, and freeze everything else.

    A, B and channel scales are float32, for activations of any dtype.

    Args:
        model: its linear layers are QuantLinear, and its fused experts are packed stacks.
        settings: equal settings give equal values of A on one kind of device.
        name: one model may carry several adapters.

    Returns:
        the paths of the adapted layers and stacks.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: a target selects no packed layer, or the model has an adapter of that name.
        OptionError: the rank is too large for every selected layer.
    """
    settings = settings or LoRASettings()
    packed = packed_layers(model)
    shapes = {path: packed_shape(layer) for path, layer in packed.items()}
    modules = [path for path, _ in model.named_modules()]
    paths = select_layers(shapes, settings.targets, settings.rank, modules, _head(model, packed))
    check_name_is_free(model, name)
    devices = {parameter.device for path in paths for parameter in packed[path].parameters()}
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        torch.manual_seed(settings.seed)
        for path in paths:
            layer = lora_layer(model, path)
            layer.add_adapter(
                name,
                settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                channel_scales=settings.train_scales and not layer.stacked,
            )
    train_only(model, name)
    return paths


class AdaptedModel:
    """The methods of a transformers model with adapters of ours that differ from its own."""

    loaded_adapter = ""
    """The folder of the adapter that was loaded last, if one was."""

    def save_pretrained(
        self, save_directory: str | Path, *_: Any, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write the adapters and no base, as PEFT does: others than the first in subfolders.

        Args:
            push_to_hub: upload the folder too (:func:`modulora_core.checkpoints.publishing.upload`,
                which takes the options).
        """
        from modulora_core.adapters.save_load import save_adapter

        assert isinstance(self, nn.Module)
        layers = (module for module in self.modules() if isinstance(module, LoRALayer))
        names = list(dict.fromkeys(name for layer in layers for name in layer.lora_A))
        for name in names:
            folder = Path(save_directory)
            save_adapter(self, folder if name == names[0] else folder / name, name=name)
        if push_to_hub:
            upload(save_directory, **options)


def adapter_layers(model: nn.Module, name: str = "default") -> Iterator[tuple[str, LoRALayer]]:
    """The layers and stacks that carry the adapter ``name``, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer) and name in module.lora_A:
            yield path, module


def packed_layers(model: nn.Module) -> dict[str, QuantLinear | PackedStack]:
    """The layers and stacks that can carry an adapter, by path. Raises ModelError if there is none.

    A tied head cannot: merging its adapter would change the embedding.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear | PackedStack) and not isinstance(module, TiedHead)
    }
    if not layers:
        raise ModelError(
            f"{model_name(model)}: expected a model with packed linear layers, found none; "
            "run `modulora quantize` on it first"
        )
    return layers


def packed_shape(layer: QuantLinear | PackedStack) -> tuple[int, ...]:
    """``(out, in)`` of a layer, ``(experts, out, in)`` of a stack."""
    if isinstance(layer, QuantLinear):
        return layer.weight.layout.shape
    return len(layer), *layer.first.layout.shape


def check_name_is_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError if the model has an adapter ``name``."""
    taken = next((path for path, _ in adapter_layers(model, name)), None)
    if taken is not None:
        raise AdapterError(
            f"adapter {name!r}: {model_name(model)} already has an adapter of that name, on {taken}"
        )


def lora_layer(model: nn.Module, path: str) -> LoRALayer:
    """The layer with adapters at ``path``; it replaces a packed layer or a stack there."""
    layer = model.get_submodule(path)
    if isinstance(layer, LoRALayer):
        return layer
    assert isinstance(layer, QuantLinear | PackedStack)
    if isinstance(model, PreTrainedModel) and not isinstance(model, AdaptedModel):
        model.__class__ = with_methods(AdaptedModel, type(model))
    adapted: LoRALayer
    if isinstance(layer, QuantLinear):
        adapted = LoRALinear(layer)
    else:
        adapted = LoRAExperts(layer, model.get_submodule(path.rpartition(".")[0]))
    adapted.train(layer.training)
    model.set_submodule(path, adapted)
    return adapted


def train_only(model: nn.Module, name: str) -> None:
    """Freeze the model except one adapter.

    TRL's trainers load the reference of a model by its config's name. With an adapter that was
    trained before, that would be another model, so the name becomes the adapter's folder, which
    transformers refuses to load as a model.
    """
    if isinstance(model, AdaptedModel) and model.loaded_adapter:
        assert isinstance(model, PreTrainedModel)
        model.config.name_or_path = model.loaded_adapter
    model.requires_grad_(False)
    for _, layer in adapter_layers(model, name):
        for parameter in layer.parameters_of(name).values():
            parameter.requires_grad_(True)


def model_name(model: nn.Module) -> str:
    """The model's name for messages."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def _head(model: nn.Module, packed: Mapping[str, nn.Module]) -> str | None:
    if not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    return next((path for path, layer in packed.items() if layer is head), None)
