"""Put LoRA adapters on a model with packed linear layers.

    y = x Ŵᵀ + s (x Aᵀ) Bᵀ      s = α / r      A : [r, in], random      B : [out, r], zero at first

:func:`add_lora` replaces each selected layer by a LoRALinear, each stack of fused experts by
LoRAExperts, and freezes everything else but the head of a task, such as a classifier's. An adapter
may also train channel scales u [in] and v [out] of linear layers, which start at one. They replace
Ŵ by diag(v) Ŵ diag(u).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modulora_core.arguments import checked
from modulora_core.layers import LoRALayer, LoRALinear, QuantLinear, TiedHead
from modulora_core.lora.adapted import (
    adapter_layers,
    check_name_is_free,
    forget_dense_name,
    model_name,
    output_head,
    packed_layers,
    packed_shape,
    task_heads,
)
from modulora_core.lora.experts import LoRAExperts
from modulora_core.lora.settings import LoRASettings
from modulora_core.lora.targets import ALL_LINEAR, ATTENTION, select_layers
from modulora_core.packed_parameters import PackedStack

logger = logging.getLogger(__name__)


@checked
def add_lora(
    model: nn.Module, settings: LoRASettings | None = None, name: str = "default"
) -> list[str]:
    """Put a new adapter on ``model``'s packed layers, in place, and freeze everything else.

    A, B and channel scales are float32, for activations of any dtype. A head outside of the base
    model, such as the classifier of AutoModelForSequenceClassification, trains in its own dtype,
    and is saved with the adapter.

    Any torch module works. transformers' models say which part is the base model, the output head
    or the text decoder; of a module without such methods all packed layers are treated alike.

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
    paths, packed = selected_layers(model, settings.targets, settings.rank), packed_layers(model)
    check_name_is_free(model, name)
    devices = {parameter.device for path in paths for parameter in packed[path].parameters()}
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        torch.manual_seed(settings.seed)
        for path in paths:
            layer = make_adaptable(model, path)
            layer.add_adapter(
                name,
                settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                channel_scales=settings.train_scales and not layer.stacked,
            )
    train_only(model, name)
    forget_dense_name(model)
    return paths


def selected_layers(model: nn.Module, targets: str | Sequence[str], rank: int) -> list[str]:
    """The paths of the layers and stacks that :func:`add_lora` would adapt. Raises as it does."""
    packed = packed_layers(model)
    shapes = {path: packed_shape(layer) for path, layer in packed.items()}
    modules = dict(model.named_modules())
    tied = next((path for path, module in modules.items() if isinstance(module, TiedHead)), None)
    head, decoder = _head(model, packed), _decoder(model)
    paths = select_layers(shapes, targets, rank, modules, head=head, decoder=decoder, tied=tied)
    outside = [path for path in shapes.keys() - {head, *paths} if not path.startswith(decoder)]
    asked = [targets] if isinstance(targets, str) else targets
    if outside and {ALL_LINEAR, ATTENTION} & {*asked}:
        logger.warning(
            "%s: targets %s: %d of %d packed layers are outside of the text decoder, such as %s, "
            "and get no adapter; to adapt them too, give targets=%s",
            model_name(model), " ".join(asked), len(outside), len(shapes), min(outside),
            [*asked, *sorted({path.rpartition(".")[2] for path in outside})],
        )  # fmt: skip
    return paths


def make_adaptable(model: nn.Module, path: str) -> LoRALayer:
    """Replace the packed layer or stack at ``path`` by one with room for adapters, and return it.

    A layer that has room stays.
    """
    layer = model.get_submodule(path)
    if isinstance(layer, LoRALayer):
        return layer
    assert isinstance(layer, QuantLinear | PackedStack)
    adapted: LoRALayer
    if isinstance(layer, QuantLinear):
        adapted = LoRALinear(layer)
    else:
        adapted = LoRAExperts(layer, model.get_submodule(path.rpartition(".")[0]))
    adapted.train(layer.training)
    model.set_submodule(path, adapted)
    return adapted


def train_only(model: nn.Module, name: str) -> None:
    """Freeze the model except one adapter and the heads of tasks."""
    model.requires_grad_(False)
    for _, layer in adapter_layers(model, name):
        for parameter in layer.parameters_of(name).values():
            parameter.requires_grad_(True)
    for head in task_heads(model).values():
        head.requires_grad_(True)


def _head(model: nn.Module, packed: Mapping[str, nn.Module]) -> str | None:
    head = output_head(model)
    return next((path for path, layer in packed.items() if layer is head), None)


def _decoder(model: Any) -> str:
    """The beginning of the paths of a multimodal model's text decoder.

    "" of a text model, and of a base model alone, such as CLIP, which has no head that uses text.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return ""
    if model.base_model is model and output_head(model) is None:
        return ""
    decoder = model.get_decoder()
    return next((f"{p}." for p, module in model.named_modules() if p and module is decoder), "")
