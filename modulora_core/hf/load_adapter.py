"""Load a saved adapter, and check that it fits the model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modulora_core.arguments import checked
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.packed_modules import install
from modulora_core.distributed import split_like, whole
from modulora_core.errors import AdapterError
from modulora_core.hf.base_record import describe_base
from modulora_core.hf.expert_format import stacks_of
from modulora_core.hf.peft_config import TASKS
from modulora_core.hf.peft_format import WITH_PEFT, AdapterDelta, SavedAdapter, read_adapter
from modulora_core.layers import LoRALayer, TiedHead
from modulora_core.lora.adapted import (
    adapter_layers,
    check_name_is_free,
    forget_dense_name,
    head_parameters,
    model_name,
    packed_layers,
    packed_shape,
)
from modulora_core.lora.adapting import make_adaptable, train_only
from modulora_core.models.skeleton import build_skeleton

logger = logging.getLogger(__name__)


@checked
def load_adapter(
    model: nn.Module, path: str | Path, name: str = "default", *, trainable: bool = False
) -> list[str]:
    """Put a saved adapter on ``model``'s packed layers, in place, and freeze everything else.

    A and B become float32. An adapter with channel scales or with the head of a task brings them
    along. A model has one head, which adapters share.

    Args:
        model: a packed model. Another quantization of the adapter's base is allowed, and logs a
            warning.
        path: a folder that :func:`save_adapter` or `peft` wrote, or a Hub id.
        name: one model may carry several adapters.
        trainable: A, B and channel scales train. A TRL trainer that would load a reference
            without the adapter (:mod:`modulora_core.hf.reference`) stops with an error, unless it
            gets ``ref_model`` or ``precompute_ref_log_probs``.

    Returns:
        the paths of the adapted layers.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: it is no LoRA adapter, it does not fit the model, or the model has an adapter
            of that name.
    """
    adapter = read_adapter(path, stacks_of(model), heads=True)
    _check_heads(adapter, model)
    _check_fit(adapter, model, model_name(model))
    check_name_is_free(model, name)
    put_on(model, adapter, name)
    forget_dense_name(model)
    if trainable:
        train_only(model, name)
    return list(adapter.deltas)


def put_on(model: nn.Module, adapter: SavedAdapter, name: str = "default") -> None:
    """Put an adapter that fits on ``model``'s packed layers, in place, and freeze everything."""
    for module, delta in adapter.deltas.items():
        layer = make_adaptable(model, module)
        layer.add_adapter(
            name,
            delta.rank,
            alpha=delta.scale * delta.rank,
            dropout=adapter.dropout,
            channel_scales=delta.channel_scales is not None,
        )
        _copy(delta, layer, name)
    _copy_heads(adapter, model)
    model.requires_grad_(False)


def restore_adapter(model: nn.Module, path: str | Path) -> None:
    """Copy the values of a saved adapter into the adapter on ``model``, to resume a run.

    Raises:
        AdapterError: it was trained on another base.
    """
    saved = read_adapter(path, stacks_of(model), heads=True)
    here = describe_base(model, model_name(model))
    difference = "" if saved.record is None else saved.record.base.difference(here)
    if difference:
        raise AdapterError(f"resume of {path}: expected the base that it began with; {difference}")
    for module, layer in adapter_layers(model):
        _copy(saved.deltas[module], layer, "default")
    _copy_heads(saved, model)


def adapter_for(
    checkpoint: PackedCheckpoint, path: str | Path, *, heads: bool = False
) -> SavedAdapter:
    """Read an adapter for the model of a checkpoint, whose weights are not loaded.

    Args:
        heads: the caller can use the head of a task; else an adapter with one is refused.

    Raises:
        AdapterError: it is no LoRA adapter, or it does not fit the model.
    """
    adapter = read_adapter(path, stacks_of(checkpoint.outline), heads=True)
    model = outline_with(checkpoint, adapter) if heads else checkpoint.outline
    _check_heads(adapter, model)
    _check_fit(adapter, model, str(checkpoint.path), checkpoint)
    return adapter


def outline_with(checkpoint: PackedCheckpoint, adapter: SavedAdapter) -> PreTrainedModel:
    """The packed model with the head of the adapter's task, if it has one, on the meta device."""
    end = next(
        (end for end, task in TASKS.items() if task == adapter.config.get("task_type")), None
    )
    if not adapter.heads or end is None:
        return checkpoint.outline
    config = checkpoint.transformers_config()
    config.num_labels = len(next(iter(adapter.heads.values())))
    model = build_skeleton(config, torch.float32, auto=f"AutoModel{end}")
    install(model, checkpoint.record)
    return model


def _check_fit(
    adapter: SavedAdapter,
    model: nn.Module,
    here: str,
    checkpoint: PackedCheckpoint | None = None,
) -> None:
    """Refuse an adapter that does not fit a packed model; warn of another base or quantization.

    Args:
        adapter: the adapter.
        model: the packed model.
        here: the model's name, for messages.
        checkpoint: the one whose outline ``model`` is, on the meta device.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: a layer is missing, dense, or of another shape; or other linear layers differ.
    """
    misfit = (
        f"adapter {adapter.folder}: made for the base {adapter.base_name}, it does not fit {here}"
    )
    packed = {path: packed_shape(layer) for path, layer in packed_layers(model).items()}
    missing = [module for module in adapter.deltas if module not in packed]
    if missing:
        modules = dict(model.named_modules())
        dense = [module for module in missing if module in modules]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        reason = f"there is no packed layer {missing[0]}"
        if dense:
            tied = isinstance(modules[dense[0]], TiedHead)
            reason = f"{dense[0]} is " + ("the embedding's table" if tied else "not packed")
            more += f"; {WITH_PEFT}"
        raise AdapterError(f"{misfit}: {reason}{more}")
    for module, delta in adapter.deltas.items():
        if delta.shape != packed[module]:
            raise AdapterError(
                f"{misfit}: {module}: expected an adapter of {list(packed[module])}, "
                f"got {list(delta.shape)}"
            )
    if adapter.record is None:
        return
    base = describe_base(model, here, checkpoint)
    if adapter.record.base.architecture != base.architecture:
        raise AdapterError(f"{misfit}: linear layers without an adapter differ")
    difference = adapter.record.base.difference(base)
    if difference:
        logger.warning("adapter %s: %s", adapter.folder, difference)


def _check_heads(adapter: SavedAdapter, model: nn.Module) -> None:
    """Refuse heads that the model lacks, or that differ from the head of another adapter."""
    here = head_parameters(model)
    others = any(isinstance(module, LoRALayer) for module in model.modules())
    for name, values in adapter.heads.items():
        if name not in here:
            part = any(path and name.startswith(f"{path}.") for path, _ in model.named_modules())
            raise AdapterError(
                f"adapter {adapter.folder}: {name}, which it trained beside LoRA: expected the "
                f"head of a task, and {model_name(model)} has "
                + (
                    f"it as a part of the language model; {WITH_PEFT}"
                    if part
                    else "none of that "
                    "name; load the class that it was trained on, such as "
                    "AutoModelForSequenceClassification"
                )
            )
        if values.shape != here[name].shape:
            raise AdapterError(
                f"adapter {adapter.folder}: {name}: expected {list(here[name].shape)} as in "
                f"{model_name(model)}, got {list(values.shape)}; load the model with its num_labels"
            )
        if others and not values.to(here[name].dtype).equal(whole(here[name].data).cpu()):
            raise AdapterError(
                f"adapter {adapter.folder}: {name}: expected the values of the model's head, which "
                "its other adapter uses, got others; load it on a model of its own"
            )


def _copy_heads(adapter: SavedAdapter, model: nn.Module) -> None:
    here = head_parameters(model)
    for name, values in adapter.heads.items():
        here[name].data.copy_(split_like(values, here[name].data))


def _copy(delta: AdapterDelta, layer: LoRALayer, name: str) -> None:
    values = {"lora_A": delta.A, "lora_B": delta.B}
    if delta.channel_scales is not None:
        values["input_scale"] = delta.channel_scales.input
        values["output_scale"] = delta.channel_scales.output
    for kind, parameter in layer.parameters_of(name).items():
        parameter.data.copy_(split_like(values[kind], parameter.data))
