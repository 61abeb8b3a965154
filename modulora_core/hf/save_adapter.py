"""Save the adapter of a model in PEFT's format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import nn

from modulora_core.arguments import checked
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.distributed import is_first, whole
from modulora_core.errors import AdapterError, OutputError
from modulora_core.hf.base_record import AdapterRecord, RecordedSettings, describe_base, record_of
from modulora_core.hf.expert_format import stacks_of
from modulora_core.hf.peft_config import TASKS, lora_config, peft_targets
from modulora_core.hf.peft_format import AdapterDelta, SavedAdapter, write_adapter
from modulora_core.layers import ChannelScales, LoRALayer
from modulora_core.lora.adapted import adapter_layers, head_parameters, model_name, task_heads
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.locate import names_file
from modulora_core.models.system_errors import usable_path


@checked
def save_adapter(
    model: nn.Module,
    out: str | Path,
    *,
    name: str = "default",
    base: str | Path | None = None,
    settings: LoRASettings | None = None,
) -> None:
    """Write an adapter in PEFT's format, with ``modulora.json`` beside it.

    The head of a task is saved too, as PEFT's ``modules_to_save``.

    In a distributed run all processes call it, and the first one writes.

    Args:
        model: the model with the adapter; FSDP2 may have split it.
        out: a folder; an adapter in it is replaced. ``adapter_config.json`` is written last: an
            unfinished folder is no adapter.
        name: one of the model's adapters.
        base: the model before quantization, for PEFT's ``base_model_name_or_path``. The default is
            the file that the model was loaded from, or the source that the checkpoint records.
        settings: the settings that made the adapter, to be recorded.

    Raises AdapterError: the model has no adapter of that name.
    """
    layers = dict(adapter_layers(model, name))
    if not layers:
        raise AdapterError(f"adapter {name!r}: {model_name(model)} has no adapter of that name")
    scaled = any(name in layer.input_scale for layer in layers.values())
    deltas = {path: _delta(layer, name, scaled) for path, layer in layers.items()}
    source = record_of(model)
    here = model_name(model)  # a file stays where it was, as PEFT remembers it
    base = str(
        base or (names_file(here) and here) or (source and source.source.get("name")) or here
    )
    stacks, dropout = stacks_of(model), next(iter(layers.values())).dropout[name].p
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
        "revision": _commit(source, base),
        # GPT-2's Conv1D has its weight transposed
        "fan_in_fan_out": source is not None and any(_is_conv1d(source, path) for path in layers),
    }
    heads = {path: whole(parameter) for path, parameter in head_parameters(model).items()}
    if heads:
        task = next((t for end, t in TASKS.items() if type(model).__name__.endswith(end)), None)
        config |= {"modules_to_save": [*task_heads(model)], "task_type": task}
    record = AdapterRecord(
        format=2 if scaled else 1,
        base=describe_base(model, base),
        settings=RecordedSettings(**{**(asdict(settings) if settings else {}), "dropout": dropout}),
        channel_scales=scaled,
    )
    if is_first():
        folder = usable_path(out, "output folder", OutputError)
        write_adapter(SavedAdapter(folder, config, record, deltas, heads), stacks)


def _commit(record: QuantizationRecord | None, base: str) -> str | None:
    """The commit of ``base`` on the Hub that was quantized; PEFT's AutoPeftModel loads it."""
    if record is None or (record.source.get("kind"), record.source.get("name")) != ("hub", base):
        return None
    return str(record.source["revision"])


def _delta(layer: LoRALayer, name: str, scaled: bool) -> AdapterDelta:
    """The adapter of one layer; ``scaled``: with channel scales, which default to ones."""
    scaled = scaled and not layer.stacked
    values = {kind: whole(parameter) for kind, parameter in layer.parameters_of(name).items()}
    A, B = values["lora_A"], values["lora_B"]
    u = values.get("input_scale", A.new_ones(layer.in_features))
    v = values.get("output_scale", A.new_ones(layer.out_features))
    return AdapterDelta(A, B, layer.scale[name], ChannelScales(u, v) if scaled else None)


def _is_conv1d(record: QuantizationRecord, path: str) -> bool:
    index = record.weights.get(f"{path}.weight")
    return index is not None and record.sites[index].kind == "conv1d"
