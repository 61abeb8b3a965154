"""Put LoRA adapters on a model with packed linear layers.

    y = x Ŵᵀ + s (x Aᵀ) Bᵀ      s = α / r      A : [r, in], random      B : [out, r], zero at first

:func:`add_lora` replaces each selected layer by a LoRALinear, each stack of fused experts by
LoRAExperts, and freezes everything else but the head of a task, such as a classifier's. An adapter
may also train channel scales u [in] and v [out] of linear layers, which start at one. They replace
Ŵ by diag(v) Ŵ diag(u).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from modulora_core.adapters.adapted import (
    adapter_layers,
    check_name_is_free,
    packed_layers,
    packed_shape,
    task_heads,
)
from modulora_core.adapters.experts import LoRAExperts
from modulora_core.adapters.save import save_adapter
from modulora_core.adapters.settings import LoRASettings
from modulora_core.adapters.targets import select_layers
from modulora_core.arguments import checked
from modulora_core.checkpoints.hf.packed_model import with_methods
from modulora_core.checkpoints.hf.publishing import upload
from modulora_core.distributed import is_first, whole
from modulora_core.layers import LoRALayer, LoRALinear, QuantLinear, TiedHead
from modulora_core.packed_parameters import PackedStack


@checked
def add_lora(
    model: nn.Module, settings: LoRASettings | None = None, name: str = "default"
) -> list[str]:
    """Put a new adapter on ``model``'s packed layers, in place, and freeze everything else.

    A, B and channel scales are float32, for activations of any dtype. A head outside of the base
    model, such as the classifier of AutoModelForSequenceClassification, trains in its own dtype,
    and is saved with the adapter.

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
    return paths


def selected_layers(model: nn.Module, targets: str | Sequence[str], rank: int) -> list[str]:
    """The paths of the layers and stacks that :func:`add_lora` would adapt. Raises as it does."""
    packed = packed_layers(model)
    shapes = {path: packed_shape(layer) for path, layer in packed.items()}
    modules = dict(model.named_modules())
    tied = next((path for path, module in modules.items() if isinstance(module, TiedHead)), None)
    return select_layers(
        shapes,
        targets,
        rank,
        modules,
        head=_head(model, packed),
        decoder=_decoder(model),
        tied=tied,
    )


_NO_REFERENCE = (
    "the base model of an adapter that was trained before; the reference of this training has the "
    "adapter too: give ref_model, or precompute_ref_log_probs=True"
)


class AdaptedModel:
    """The methods of a transformers model with adapters of ours that differ from its own."""

    _name = ""

    def forbid_reference(self) -> None:
        """Replace the config's name by a sentence, if an adapter changes the model.

        A Trainer that is made calls this. A trainer of TRL then loads the reference of this model
        by its config's name, which has no adapter. After a training the reference would be another
        model, and transformers refuses to load the sentence. :meth:`train` restores the name.
        """
        assert isinstance(self, PreTrainedModel)
        if not self._name and any(_has_changed(module) for module in self.modules()):
            self._name, self.config.name_or_path = self.config.name_or_path, _NO_REFERENCE

    def train(self, mode: bool = True) -> Any:
        """Turn dropout on or off, as torch does, and restore the config's name."""
        model: Any = super()
        if self._name:
            assert isinstance(self, PreTrainedModel)
            self.config.name_or_path, self._name = self._name, ""
        return model.train(mode)

    def save_pretrained(
        self, save_directory: str | Path, *_: Any, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write the adapters and no base, as PEFT does: others than the first in subfolders.

        transformers' Trainer passes a ``state_dict``, and continues a checkpoint with the file that
        has its name. So the parameters that train are also written to it, by their names here.

        Args:
            push_to_hub: upload the folder too. The options go to
                :func:`modulora_core.checkpoints.hf.publishing.upload`.
        """
        assert isinstance(self, nn.Module)
        layers = (module for module in self.modules() if isinstance(module, LoRALayer))
        names = list(dict.fromkeys(name for layer in layers for name in layer.lora_A))
        for name in names:
            folder = Path(save_directory)
            save_adapter(self, folder if name == names[0] else folder / name, name=name)
        if "state_dict" in options:
            trained = {n: whole(p) for n, p in self.named_parameters() if p.requires_grad}
            if is_first():
                save_file(trained, Path(save_directory) / SAFE_WEIGHTS_NAME, {"format": "pt"})
        if push_to_hub:
            upload(save_directory, **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters as torch does; unless ``strict``, frozen ones may be missing."""
        assert isinstance(self, nn.Module)
        result = nn.Module.load_state_dict(self, state_dict, strict, assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = [name for name in result.missing_keys if name in trained]
        return type(result)(missing, result.unexpected_keys)


def make_adaptable(model: nn.Module, path: str) -> LoRALayer:
    """Replace the packed layer or stack at ``path`` by one with room for adapters, and return it.

    The model's class gets the methods of :class:`AdaptedModel`. A layer that has room stays.
    """
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
    """Freeze the model except one adapter and the heads of tasks."""
    model.requires_grad_(False)
    for _, layer in adapter_layers(model, name):
        for parameter in layer.parameters_of(name).values():
            parameter.requires_grad_(True)
    for head in task_heads(model).values():
        head.requires_grad_(True)


def _has_changed(module: nn.Module) -> bool:
    """Whether a layer has an adapter that changes its product."""
    return isinstance(module, LoRALayer) and any(
        bool((values.detach() != start).any())
        for start, parameters in (
            (0, module.lora_B), (1, module.input_scale), (1, module.output_scale)
        )
        for values in parameters.values()
    )  # fmt: skip


def _head(model: nn.Module, packed: Mapping[str, nn.Module]) -> str | None:
    if not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    return next((path for path, layer in packed.items() if layer is head), None)


def _decoder(model: nn.Module) -> str:
    """The beginning of the paths of a multimodal model's text decoder; "" of a text model."""
    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{p}." for p, module in model.named_modules() if p and module is decoder), "")
