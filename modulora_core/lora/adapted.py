"""Find the layers of a model that carry an adapter, or can carry one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from modulora_core.errors import AdapterError, ModelError
from modulora_core.layers import LoRALayer, QuantLinear, TiedHead
from modulora_core.packed_parameters import PackedStack


def adapter_layers(model: nn.Module, name: str = "default") -> Iterator[tuple[str, LoRALayer]]:
    """The layers and stacks that carry the adapter ``name``, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer) and name in module.lora_A:
            yield path, module


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order of their first layers."""
    layers = (module for module in model.modules() if isinstance(module, LoRALayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.lora_A))


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
        return layer.packed_weight.layout.shape
    return len(layer), *layer.first.layout.shape


def check_name_is_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError if the model has an adapter ``name``."""
    taken = next((path for path, _ in adapter_layers(model, name)), None)
    if taken is not None:
        raise AdapterError(
            f"adapter {name!r}: {model_name(model)} already has an adapter of that name, on {taken}"
        )


def forget_dense_name(model: nn.Module) -> None:
    """Empty the config's name of a model that was packed while it was loaded.

    TRL's trainers load a reference by that name, which would be the dense model.
    """
    if not getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True):
        model.config.name_or_path = ""  # type: ignore[union-attr]


def task_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The modules beside the base model and the output head, such as a classifier, by name.

    ``model.base_model`` is the base model, as transformers' models have it. A model without that
    attribute has no such modules.
    """
    base = getattr(model, "base_model", model)
    if base is model:
        return {}
    others = (base, output_head(model))
    return {
        name: child
        for name, child in model.named_children()
        if not any(child is other for other in others) and [*child.parameters()]
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head, if the model has the method by which transformers' models give theirs."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of :func:`task_heads`, by their names in the model."""
    return {
        f"{path}.{name}": parameter
        for path, head in task_heads(model).items()
        for name, parameter in head.named_parameters()
    }


def model_name(model: nn.Module) -> str:
    """The model's name for messages."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
