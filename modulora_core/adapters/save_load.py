"""Save the adapter of a model, load a saved one, and check that it fits the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from modulora_core.adapters.expert_format import stacks_of
from modulora_core.adapters.lora import (
    AdaptedModel,
    LoRASettings,
    adapter_layers,
    check_name_is_free,
    lora_layer,
    model_name,
    packed_layers,
    packed_shape,
    train_only,
)
from modulora_core.adapters.peft_config import lora_config, peft_targets
from modulora_core.adapters.peft_format import (
    AdapterDelta,
    SavedAdapter,
    read_adapter,
    write_adapter,
)
from modulora_core.adapters.record import AdapterRecord, RecordedSettings, describe_base, record_of
from modulora_core.arguments import checked
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.distributed import is_first, split_like, whole
from modulora_core.errors import AdapterError, OutputError, usable_path
from modulora_core.layers import LoRALayer
from modulora_core.packed import ChannelScales

logger = logging.getLogger(__name__)


@checked
def save_adapter(
    model: nn.Module,
    out: str | Path,
    *,
    name: str = "default",
    base: str | None = None,
    settings: LoRASettings | None = None,
) -> None:
    """Write an adapter in PEFT's format, with ``modulora.json`` beside it.

    In a distributed run all processes call it, and the first one writes.

    Args:
        model: the model with the adapter; FSDP2 may have split it.
        out: a folder; an adapter in it is replaced. ``adapter_config.json`` is written last: an
            unfinished folder is no adapter.
        name: one of the model's adapters.
        base: the model before quantization, for PEFT's ``base_model_name_or_path``. The default is
            the source that the checkpoint records.
        settings: the settings that made the adapter, to be recorded.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    layers = dict(adapter_layers(model, name))
    if not layers:
        raise AdapterError(f"adapter {name!r}: {model_name(model)} has no adapter of that name")
    scaled = any(name in layer.input_scale for layer in layers.values())
    deltas = {path: _delta(layer, name, scaled) for path, layer in layers.items()}
    source = record_of(model)
    base = base or str((source and source.source.get("name")) or model_name(model))
    stacks, dropout = stacks_of(model), next(iter(layers.values())).dropout.p
    modules = [path for path, _ in model.named_modules()]
    parameters = [path for path, _ in model.named_parameters()]
    config = {
        **lora_config(
            {path: delta.rank for path, delta in deltas.items()},
            {path: delta.scale for path, delta in deltas.items()},
            dropout,
            peft_targets(layers, stacks, modules, parameters),
        ),
        "base_model_name_or_path": base,
        # GPT-2's Conv1D has its weight transposed
        "fan_in_fan_out": source is not None and any(_is_conv1d(source, path) for path in layers),
    }
    record = AdapterRecord(
        format=2 if scaled else 1,
        base=describe_base(model, base),
        settings=RecordedSettings(**{**(asdict(settings) if settings else {}), "dropout": dropout}),
        channel_scales=scaled,
    )
    if is_first():
        folder = usable_path(out, "output folder", OutputError)
        write_adapter(SavedAdapter(folder, config, record, deltas), stacks)


@checked
def load_adapter(
    model: nn.Module, path: str | Path, name: str = "default", *, trainable: bool = False
) -> list[str]:
    """Put a saved adapter on ``model``'s packed layers, in place, and freeze everything else.

    A and B become float32. An adapter with channel scales brings them along.

    Args:
        model: a packed model. Another quantization of the adapter's base is allowed, and logs a
            warning.
        path: a folder that :func:`save_adapter` or `peft` wrote, or a Hub id.
        name: one model may carry several adapters.
        trainable: A, B and channel scales train. ``model.config.name_or_path`` becomes the folder
            of the adapter then: a trainer of TRL that would load its reference by that name stops
            with an error, unless it gets ``ref_model`` or ``precompute_ref_log_probs``.

    Returns:
        the paths of the adapted layers.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: it is no LoRA adapter, it does not fit the model, or the model has an adapter
            of that name.
    """
    adapter = read_adapter(path, stacks_of(model))
    check_fit(adapter, model, model_name(model))
    check_name_is_free(model, name)
    for module, delta in adapter.deltas.items():
        layer = lora_layer(model, module)
        layer.add_adapter(
            name,
            delta.rank,
            alpha=delta.scale * delta.rank,
            dropout=adapter.dropout,
            channel_scales=delta.channel_scales is not None,
        )
        _copy(delta, layer, name)
    if isinstance(model, AdaptedModel):
        model.loaded_adapter = str(adapter.folder)
    if trainable:
        train_only(model, name)
    else:
        model.requires_grad_(False)
    return list(adapter.deltas)


def restore_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Copy the values of a saved adapter into the same adapter on ``model``, to resume a run.

    Raises:
        AdapterError: it was trained on another base.
    """
    saved = read_adapter(path, stacks_of(model))
    here = describe_base(model, model_name(model))
    difference = "" if saved.record is None else saved.record.base.difference(here)
    if difference:
        raise AdapterError(f"resume of {path}: expected the base that it began with; {difference}")
    for module, layer in adapter_layers(model, name):
        _copy(saved.deltas[module], layer, name)


def check_fit(
    adapter: SavedAdapter,
    model: nn.Module,
    here: str,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Refuse an adapter that does not fit a packed model; warn of another base or quantization.

    Args:
        adapter: the adapter.
        model: the packed model.
        here: the model's name, for messages.
        read: gives a parameter by name, for a model on the meta device.

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
        modules = {path for path, _ in model.named_modules()}
        dense = [module for module in missing if module in modules]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        reason = f"{dense[0]} is not packed" if dense else f"there is no packed layer {missing[0]}"
        raise AdapterError(f"{misfit}: {reason}{more}")
    for module, delta in adapter.deltas.items():
        if delta.shape != packed[module]:
            raise AdapterError(
                f"{misfit}: {module}: expected an adapter of {list(packed[module])}, "
                f"got {list(delta.shape)}"
            )
    if adapter.record is None:
        return
    base = describe_base(model, here, read)
    if adapter.record.base.architecture != base.architecture:
        raise AdapterError(f"{misfit}: linear layers without an adapter differ")
    difference = adapter.record.base.difference(base)
    if difference:
        logger.warning("adapter %s: %s", adapter.folder, difference)


def _delta(layer: LoRALayer, name: str, scaled: bool) -> AdapterDelta:
    """The adapter of one layer; ``scaled``: with channel scales, which default to ones."""
    scaled = scaled and not layer.stacked
    values = {kind: whole(parameter) for kind, parameter in layer.parameters_of(name).items()}
    A, B = values["lora_A"], values["lora_B"]
    u = values.get("input_scale", A.new_ones(layer.in_features))
    v = values.get("output_scale", A.new_ones(layer.out_features))
    return AdapterDelta(A, B, layer.scale[name], ChannelScales(u, v) if scaled else None)


def _copy(delta: AdapterDelta, layer: LoRALayer, name: str) -> None:
    values = {"lora_A": delta.A, "lora_B": delta.B}
    if delta.channel_scales is not None:
        values["input_scale"] = delta.channel_scales.input
        values["output_scale"] = delta.channel_scales.output
    for kind, parameter in layer.parameters_of(name).items():
        parameter.data.copy_(split_like(values[kind], parameter.data))


def _is_conv1d(record: QuantizationRecord, path: str) -> bool:
    index = record.weights.get(f"{path}.weight")
    return index is not None and record.sites[index].kind == "conv1d"
