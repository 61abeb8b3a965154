"""Put packed modules into a model's skeleton, in place of the parameters that a record names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modulora_core.checkpoints.record import PackedSite, QuantizationRecord
from modulora_core.devices.dense_products import DenseLinear
from modulora_core.errors import CheckpointError
from modulora_core.layers import (
    PackedParameter,
    PackedStack,
    PackedTable,
    QuantLinear,
    TiedHead,
)
from modulora_core.spec import Quantizer


def install(model: nn.Module, record: QuantizationRecord) -> None:
    """Replace the parameters that ``record`` names by packed ones on the meta device.

    Linear layers that stay dense become :class:`modulora_core.devices.dense_products.DenseLinear`.

    Raises:
        CheckpointError: the model has no such parameter, or one of another shape, or a quantizer
            doesn't read its packed format.
        PluginError: a quantizer isn't installed or can't be used.
    """
    quantizers = [recipe.create() for recipe in record.recipes]
    for parameter, site in record.items():
        path, _, leaf = parameter.rpartition(".")
        try:
            parent = model.get_submodule(path)
            dense = parent.get_parameter(leaf)
        except AttributeError:
            raise CheckpointError(
                f"{parameter}: expected a parameter of the model, and {type(model).__name__} has "
                "none of that name"
            ) from None
        if dense.shape != site.parameter_shape:
            raise CheckpointError(
                f"{parameter}: expected shape {list(dense.shape)} by config.json, got a packed "
                f"weight of {list(site.parameter_shape)}"
            )
        quantizer = quantizers[site.recipe]
        quantizer.check_format(site.layout)
        if site.kind == "experts":
            _install_experts(model, parent, leaf, site, quantizer)
        elif site.kind == "embedding":
            _install_table(model, path, site, quantizer, dense.dtype)
        else:
            linear = QuantLinear(_packed(site, quantizer), parent._parameters["bias"])
            model.set_submodule(path, _initialized(linear))
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:  # a subclass may compute something else
            model.set_submodule(path, DenseLinear.of(module))


def use_eager_experts(module: nn.Module) -> None:
    """Let experts multiply one by one: transformers' batched code wants dense tensors."""
    configs = (getattr(owner, "config", None) for owner in module.modules())
    for config in {id(config): config for config in configs if config is not None}.values():
        config._experts_implementation = "eager"


def _packed(site: PackedSite, quantizer: Quantizer) -> PackedParameter:
    # a Conv1D becomes a QuantLinear, whose forward knows the orientation; a stack is used by the
    # model's code
    transposed = site.transposed and site.kind == "experts"
    return PackedParameter(quantizer, site.layout.empty("meta"), transposed=transposed)


def _initialized(module: nn.Module) -> nn.Module:
    """Mark a module for transformers, which fills others with noise after loading."""
    module._is_hf_initialized = True  # type: ignore[assignment]
    return module


def _install_experts(
    model: nn.Module, parent: nn.Module, leaf: str, site: PackedSite, quantizer: Quantizer
) -> None:
    del parent._parameters[leaf]
    parent.add_module(leaf, PackedStack(_packed(site, quantizer) for _ in range(site.experts or 0)))
    _initialized(parent)
    use_eager_experts(model)


def _install_table(
    model: nn.Module, path: str, site: PackedSite, quantizer: Quantizer, dtype: torch.dtype
) -> None:
    """Put a packed table into the embedding at ``path``, and into the heads tied to it."""
    table = PackedTable(quantizer, site.layout.empty("meta"), dtype)
    embedding = model.get_submodule(path)
    if not isinstance(embedding, nn.Embedding):
        raise CheckpointError(
            f"{path}: packed as an input embedding: expected nn.Embedding, got "
            f"{type(embedding).__name__}"
        )
    for head in _untie(model, f"{path}.weight"):
        linear = model.get_submodule(head)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"{head}: tied to the packed embedding {path}: expected nn.Linear, got "
                f"{type(linear).__name__}"
            )
        model.set_submodule(head, _initialized(TiedHead(table, linear.bias)))
    del embedding._parameters["weight"]
    embedding.add_module("weight", _initialized(table))  # it may itself have buffers to compute


def _untie(model: Any, parameter: str) -> list[str]:
    """The modules whose weight is tied to ``parameter``. transformers then forgets these ties."""
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    tied = [name for name, other in ties.items() if other == parameter]
    left = {name: other for name, other in ties.items() if name not in tied}
    # of this object: the class keeps its own
    model.all_tied_weights_keys = model._tied_weights_keys = left
    return [name.rpartition(".")[0] for name in tied]
