"""Put packed modules into a model, in place of the parameters that a record names, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modulora_core.checkpoints.joined_rows import JoinedRows
from modulora_core.checkpoints.record import PackedSite, QuantizationRecord
from modulora_core.dense_products import DenseLinear
from modulora_core.errors import AdapterError, CheckpointError, ModelError
from modulora_core.layers import LoRALayer, QuantLinear, TiedHead
from modulora_core.packed_parameters import PackedParameter, PackedStack, PackedTable
from modulora_core.spec import Quantizer


def install(
    model: nn.Module, record: QuantizationRecord, quantizers: Sequence[Quantizer] | None = None
) -> None:
    """Replace the parameters that ``record`` names by packed ones on the meta device.

    A model with another head, such as a classifier, has no place for the packed output head, which
    is left out. Linear layers that stay dense become
    :class:`modulora_core.dense_products.DenseLinear`.

    Args:
        quantizers: one for each recipe of the record; by default the recipes'.

    Raises CheckpointError, PluginError.
    """
    if quantizers is None:
        with torch.device("cpu"):  # the tables of a plugin hold values, in a skeleton too
            quantizers = [recipe.create() for recipe in record.recipes]
    for parameter, site in record.items():
        name = _name_in(model, parameter)
        if name is not None:
            quantizers[site.recipe].check_format(site.layout)
            install_parameter(model, name, site, quantizers[site.recipe])
        elif site.kind == "embedding" or (record.base and parameter.startswith(record.base)):
            raise CheckpointError(
                f"{parameter}: expected a parameter of the model, and {type(model).__name__} has "
                "none of that name; load another class, such as AutoModelForCausalLM"
            )
    use_dense_products(model)


def install_parameter(model: nn.Module, name: str, site: PackedSite, quantizer: Quantizer) -> None:
    """Replace one parameter of ``model`` by a packed one on the meta device.

    Raises CheckpointError: the parameter has another shape.
    """
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    dense = parent.get_parameter(leaf)
    if dense.shape != site.parameter_shape:
        raise CheckpointError(
            f"{name}: expected shape {list(dense.shape)} by config.json, got a packed weight of "
            f"{list(site.parameter_shape)}"
        )
    if site.kind == "experts":
        _install_experts(model, parent, leaf, site, quantizer)
    elif site.kind == "embedding":
        _install_table(model, path, site, quantizer, dense.dtype)
    else:
        weight = _packed(site, quantizer, dense.dtype)
        linear = QuantLinear(weight, parent._parameters["bias"])
        model.set_submodule(path, _initialized(linear))


def use_dense_products(model: nn.Module, skip: Collection[str] = ()) -> None:
    """Replace the linear layers that stay dense, all but ``skip``, by ``DenseLinear``."""
    for path, module in list(model.named_modules()):
        # a subclass may compute something else
        if type(module) is nn.Linear and path not in skip:
            model.set_submodule(path, DenseLinear.of(module))


def _name_in(model: nn.Module, parameter: str) -> str | None:
    """Find a recorded parameter in ``model``; return its name there, or None.

    Recorded names start with the base model's name. The base model by itself has no such prefix.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (parameter, parameter.removeprefix(prefix), prefix + parameter):
        with contextlib.suppress(AttributeError):
            model.get_parameter(name)
            return name
    return None


def unpack(model: Any, dtype: torch.dtype) -> None:
    """Replace all packed modules by dense ones in ``dtype``, a layer at a time.

    Raises AdapterError: an adapter of ours is on a layer.
    """
    tables: dict[PackedParameter, nn.Parameter] = {}
    heads: list[tuple[nn.Module, str, TiedHead]] = []
    stacks: list[tuple[nn.Module, str, PackedStack]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALayer):
                raise AdapterError(
                    "dequantize: expected a model without an adapter of add_lora; save it with "
                    "save_adapter, and write the dense model with both by `modulora merge`"
                )
            if isinstance(child, TiedHead):
                heads.append((parent, name, child))
            elif isinstance(child, QuantLinear):
                setattr(parent, name, _dense_linear(child, child.packed_weight.dense(dtype)))
            elif isinstance(child, PackedStack):
                stacks.append((parent, name, child))
            elif isinstance(child, PackedTable):
                delattr(parent, name)
                tables[child] = nn.Parameter(child.dense(dtype), requires_grad=False)
                parent.register_parameter(name, tables[child])
    for parent, name, stack in sorted(stacks, key=lambda found: found[2].position):
        _unpack_stack(parent, name, stack, dtype)
    for parent, name, head in heads:
        setattr(parent, name, _dense_linear(head, tables[head.packed_weight]))
    if heads:
        del model._tied_weights_keys  # the class's own: see _untie
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _unpack_stack(parent: nn.Module, name: str, stack: PackedStack, dtype: torch.dtype) -> None:
    """Put the dense stack at its position among the parameters: PEFT nests them in that order."""
    delattr(parent, name)
    dense = [part.dense(dtype) for part in stack if isinstance(part, PackedParameter)]
    parent.register_parameter(name, nn.Parameter(torch.stack(dense), requires_grad=False))
    for other in list(parent._parameters)[stack.position : -1]:
        parent._parameters[other] = parent._parameters.pop(other)


def _dense_linear(layer: QuantLinear, weight: Tensor) -> nn.Module:
    """The layer with a dense weight, of which the model's code sees ``[in, out]`` in a Conv1D."""
    with torch.device("meta"):
        linear = (
            Conv1D(layer.out_features, layer.in_features)
            if layer.packed_weight.transposed
            else nn.Linear(layer.in_features, layer.out_features)
        )
    tied = isinstance(weight, nn.Parameter)
    linear.weight = weight if tied else nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear


def current_record(model: nn.Module, record: QuantizationRecord) -> QuantizationRecord:
    """The record of the packed modules that ``model`` has now, by their names in it.

    Layers may have been removed, moved or replaced by dense ones since it was loaded.

    Raises ModelError: the model has a packed module that no site of ``record`` describes.
    """
    quantizers = [recipe.create() for recipe in record.recipes]
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedStack):
            matrix, experts, kinds = module.first, len(module), ["experts"]
        elif isinstance(module, PackedParameter) and name.rpartition(".")[0] not in weights:
            matrix, experts = module, None
            kinds = ["embedding"] if isinstance(module, PackedTable) else ["linear", "conv1d"]
        else:
            continue
        weights[name] = next(
            (
                number
                for number, site in enumerate(record.sites)
                if site.kind in kinds
                and (site.experts, site.transposed) == (experts, matrix.transposed)
                and site.layout == matrix.layout
                and _is_same(quantizers[site.recipe], matrix.quantizer)
            ),
            -1,
        )
        if weights[name] < 0:
            raise ModelError(
                f"{name}: expected a packed weight of this checkpoint, got one of "
                f"{matrix.layout.quantizer} that its config.json does not describe; save the "
                "model that it comes from"
            )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    dense = {
        name.removeprefix(prefix) for name, _ in model.named_parameters(remove_duplicate=False)
    }
    kept = {
        reason: [name for name in names if name.removeprefix(prefix) in dense]
        for reason, names in record.kept.items()
    }
    return record.model_copy(update={"weights": weights, "kept": kept})


def _is_same(one: Quantizer, other: Quantizer) -> bool:
    if isinstance(one, JoinedRows) and isinstance(other, JoinedRows):
        return len(one.parts) == len(other.parts) and all(map(_is_same, one.parts, other.parts))
    return type(one) is type(other) and one.options == other.options


def use_eager_experts(module: nn.Module) -> None:
    """Let experts multiply one by one: transformers' batched code wants dense tensors."""
    configs = (getattr(owner, "config", None) for owner in module.modules())
    for config in {id(config): config for config in configs if config is not None}.values():
        config._experts_implementation = "eager"


def _packed(site: PackedSite, quantizer: Quantizer, dtype: torch.dtype) -> PackedParameter:
    empty = site.layout.empty("meta")
    return PackedParameter(quantizer, empty, transposed=site.transposed, dtype=dtype)


def _initialized(module: nn.Module) -> nn.Module:
    """Mark a module for transformers, which fills others with noise after loading."""
    module._is_hf_initialized = True  # type: ignore[assignment]
    return module


def _install_experts(
    model: nn.Module, parent: nn.Module, leaf: str, site: PackedSite, quantizer: Quantizer
) -> None:
    place = list(parent._parameters).index(leaf)
    for other in sorted(
        child.position for child in parent.children() if isinstance(child, PackedStack)
    ):
        place += other <= place  # it is already packed, and no parameter any more
    dtype = parent._parameters.pop(leaf).dtype  # type: ignore[union-attr]
    matrices = (_packed(site, quantizer, dtype) for _ in range(site.experts or 0))
    parent.add_module(leaf, PackedStack(matrices, place))
    _initialized(parent)
    use_eager_experts(model)


def _install_table(
    model: nn.Module, path: str, site: PackedSite, quantizer: Quantizer, dtype: torch.dtype
) -> None:
    """Put a packed table into the embedding at ``path``, and into the heads tied to it."""
    table = PackedTable(quantizer, site.layout.empty("meta"), dtype=dtype)
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
    # set on this object, as the class keeps its own
    model.all_tied_weights_keys = model._tied_weights_keys = left
    return [name.rpartition(".")[0] for name in tied]
