"""LoRA adapters on a model of packed layers: made, saved and loaded.

    y = x Ŵᵀ + s (x Aᵀ) Bᵀ        s = α / r        A : [r, in], random        B : [out, r], zero at first

Each packed linear layer that is chosen becomes a LoRALinear in its place; the rest is frozen. An adapter may train
channel scales too, u [in] and v [out], one at first: then diag(v) Ŵ diag(u) stands for Ŵ. The files are
PEFT's (:mod:`modulora_core.adapters.peft_format`): `peft` uses an adapter trained here on the dense model, and one
trained there is used here on a packed one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modulora_core.adapters.peft_format import (
    AdapterDelta,
    AdapterFolder,
    adapter_deltas,
    write_adapter,
)
from modulora_core.adapters.record import AdapterRecord, describe_base, record_of
from modulora_core.adapters.targets import ALL_LINEAR, select_targets, shortest_names
from modulora_core.errors import AdapterError, ModelError, OptionError
from modulora_core.layers import LoRALinear, PackedStack, QuantLinear, TiedHead
from modulora_core.packed import ChannelScales

__all__ = [
    "AdapterDelta",
    "AdapterFolder",
    "LoRASettings",
    "adapter_deltas",
    "adapter_layers",
    "add_lora",
    "check_rank",
    "load_adapter",
    "save_adapter",
    "set_adapter",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoRASettings:
    """What an adapter is made of. The defaults are the paper's (arXiv 2309.16119), but for the targets.

    Attributes:
        rank: r.
        alpha: α; the adapter is scaled by α / r.
        dropout: probability with which an input of the adapter is left out in training.
        targets: a name or several: a layer is chosen if its path is the name or ends with ``.name``, as in
            PEFT; or ``"all-linear"``: every packed linear layer but the output head.
        seed: of A's random values.
        train_scales: whether each layer's channel scales train too.

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
        if self.rank < 1:
            raise OptionError(f"rank: expected at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise OptionError(f"alpha: expected more than 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if not self.targets:
            raise OptionError(f"targets: expected {ALL_LINEAR!r} or names of layers, got none")


def check_rank(rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank that no layer can have.

    B A has at most the rank min(in, out). A layer that is smaller than the others is no reason to refuse: one rank for all is what
    most people want, and there it only costs memory.

    Args:
        rank: r.
        shapes: ``(out, in)`` of each layer that is to have an adapter, by its path.

    Raises:
        OptionError: r is larger than min(in, out) of every layer.
    """
    largest = max(shapes, key=lambda path: min(shapes[path]), default=None)
    if largest is not None and rank > (most := min(shapes[largest])):
        out, in_ = shapes[largest]
        raise OptionError(
            f"rank {rank}: expected at most {most}, as no adapted layer can change by a matrix of a higher rank (the largest, "
            f"{largest}, is [{out}, {in_}]); lower the rank"
        )


def add_lora(model: nn.Module, settings: LoRASettings, name: str = "default") -> list[str]:
    """Put a new adapter on ``model``'s packed layers, in place, and freeze everything else.

    A, B and channel scales are float32 whatever the activations are.

    Args:
        model: its linear layers are QuantLinear.
        settings: the same settings give the same values of A on one kind of device.
        name: one model may carry several adapters.

    Returns:
        the paths of the layers that it is on.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: a target is no packed layer (the message has near misses), or the model has an adapter
            of that name.
        OptionError: see :func:`check_rank`. Where the rank is too large for some of the layers alone, that is a warning.
    """
    packed = _packed_layers(model)
    paths = select_targets(packed, settings.targets, [path for path, _ in model.named_modules()])
    if ALL_LINEAR in settings.targets:
        paths = [path for path in paths if not _is_head(model, path)]
    _check_name_is_free(model, name)
    shapes = {path: (packed[path].out_features, packed[path].in_features) for path in paths}
    check_rank(settings.rank, shapes)
    _warn_of_small_layers(settings.rank, shapes)
    stacked = sum(len(module) for module in model.modules() if isinstance(module, PackedStack))
    if stacked and len(paths) == len(packed):
        logger.warning("%s: %d packed expert matrices stay as they are: only linear layers take an adapter",
                       _name_of(model), stacked)  # fmt: skip
    devices = {packed[path].weight.device for path in paths}
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        torch.manual_seed(settings.seed)
        for path in paths:
            layer = _as_lora(model, path)
            layer.add_adapter(name, settings.rank, alpha=settings.alpha, dropout=settings.dropout,
                              channel_scales=settings.train_scales)  # fmt: skip
    _train_only(model, name)
    return paths


def adapter_layers(model: nn.Module, name: str = "default") -> Iterator[tuple[str, LoRALinear]]:
    """The layers that carry the adapter ``name``, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and name in module.lora_A:
            yield path, module


def _warn_of_small_layers(rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    small = [path for path, shape in shapes.items() if min(shape) < rank]
    if small:
        logger.warning("rank %d: %d of %d adapted layers have fewer rows or columns, as %s %s: the rest of A and B only takes memory",
                       rank, len(small), len(shapes), small[0], list(shapes[small[0]]))  # fmt: skip


def _packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Those that may carry an adapter: a tied head can't, as a merged one would change the embedding."""
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear) and not isinstance(module, TiedHead)
    }
    if not layers:
        raise ModelError(f"{_name_of(model)}: expected a model with packed linear layers, found none; "
                         "run `modulora quantize` on it first")  # fmt: skip
    return layers


def _is_head(model: nn.Module, path: str) -> bool:
    """Whether the output head is at ``path``: packed to save memory, it is trained as rarely as a dense one, by its name only."""
    return isinstance(
        model, PreTrainedModel
    ) and model.get_output_embeddings() is model.get_submodule(path)


def _name_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _check_name_is_free(model: nn.Module, name: str) -> None:
    taken = next((path for path, _ in adapter_layers(model, name)), None)
    if taken is not None:
        raise AdapterError(
            f"adapter {name!r}: {_name_of(model)} has one of that name already, on {taken}"
        )


def _as_lora(model: nn.Module, path: str) -> LoRALinear:
    """The LoRALinear at ``path``, put there if there is none yet."""
    layer = model.get_submodule(path)
    if isinstance(layer, LoRALinear):
        return layer
    assert isinstance(layer, QuantLinear)
    adapted = LoRALinear(layer)
    adapted.train(layer.training)
    model.set_submodule(path, adapted)
    return adapted


def _train_only(model: nn.Module, name: str) -> None:
    """Freeze the model but for one adapter."""
    model.requires_grad_(False)
    for _, layer in adapter_layers(model, name):
        for parameter in layer.parameters_of(name).values():
            parameter.requires_grad_(True)


def save_adapter(
    model: nn.Module,
    out: str | Path,
    *,
    name: str = "default",
    base: str | None = None,
    settings: LoRASettings | None = None,
) -> None:
    """Write an adapter in PEFT's format, with ``modulora.json`` beside it.

    Args:
        model: with the adapter on it.
        out: a folder; it may exist, and an adapter in it is replaced. Without ``adapter_config.json``, which
            is written last, it is no adapter.
        name: which of the model's adapters.
        base: the name of the model before it was quantized, for PEFT's ``base_model_name_or_path``; by
            default what the checkpoint says.
        settings: what the adapter was made of, to be recorded.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    layers = dict(adapter_layers(model, name))
    if not layers:
        raise AdapterError(f"adapter {name!r}: {_name_of(model)} has none of that name")
    scaled = any(name in layer.input_scale for layer in layers.values())
    record = AdapterRecord(
        describe_base(model, base or _base_name(model)),
        asdict(settings) if settings else {},
        channel_scales=scaled,
    )
    write_adapter(
        Path(out),
        {path: _delta(layer, name, scaled) for path, layer in layers.items()},
        record,
        target_modules=shortest_names(layers, [path for path, _ in model.named_modules()]),
        dropout=next(iter(layers.values())).dropout,
        fan_in_fan_out=any(_was_conv1d(model, path) for path in layers),
    )


def _delta(layer: LoRALinear, name: str, scaled: bool) -> AdapterDelta:
    """The adapter of one layer, on no graph; ``scaled``: with channel scales, which are ones where it has none."""
    values = {kind: parameter.data for kind, parameter in layer.parameters_of(name).items()}
    A, B = values["lora_A"], values["lora_B"]
    u = values.get("input_scale", A.new_ones(layer.in_features))
    v = values.get("output_scale", A.new_ones(layer.out_features))
    return AdapterDelta(A, B, layer.scale[name], ChannelScales(u, v) if scaled else None)


def set_adapter(layer: LoRALinear, delta: AdapterDelta, name: str = "default") -> None:
    """Copy A, B and the channel scales of ``delta`` into the layer's adapter ``name``, which was made like it."""
    layer.lora_A[name].data.copy_(delta.A)
    layer.lora_B[name].data.copy_(delta.B)
    if delta.channel_scales is not None:
        layer.input_scale[name].data.copy_(delta.channel_scales.input)
        layer.output_scale[name].data.copy_(delta.channel_scales.output)


def _base_name(model: nn.Module) -> str:
    record = record_of(model)
    return (
        str(record.source.get("name") or _name_of(model)) if record is not None else _name_of(model)
    )


def _was_conv1d(model: nn.Module, path: str) -> bool:
    """Whether the dense model has GPT-2's transposed Conv1D at ``path``."""
    record = record_of(model)
    index = None if record is None else record.weights.get(f"{path}.weight")
    return record is not None and index is not None and record.sites[index].kind == "conv1d"


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
) -> list[str]:
    """Put a saved adapter on ``model``'s packed layers, in place, and freeze everything else.

    A and B become float32 whatever they are stored in. Channel scales come with the adapter that has them.

    Args:
        model: its linear layers are QuantLinear. It may be another quantization of the adapter's base than
            the one that it was trained on: then a warning is logged.
        path: a folder that :func:`save_adapter` or `peft` wrote, or a Hub id.
        name: one model may carry several adapters.
        trainable: whether its A and B train, and its channel scales if it has them.

    Returns:
        the paths of the layers that it is on.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: it isn't a LoRA adapter that can be used; it doesn't fit this model (the message says
            which base it was made for, and the layer and shapes that differ); or the model has an adapter of
            that name.
    """
    folder = AdapterFolder(path)
    _check_fit(model, folder, str(path))
    _check_name_is_free(model, name)
    for module, delta in folder.items():
        layer = _as_lora(model, module)
        dropout = float(folder.config.get("lora_dropout") or 0.0)
        layer.add_adapter(name, delta.rank, alpha=delta.scale * delta.rank, dropout=dropout,
                          channel_scales=delta.channel_scales is not None)  # fmt: skip
        set_adapter(layer, delta, name)
        layer.scale[name] = delta.scale
    if trainable:
        _train_only(model, name)
    else:
        model.requires_grad_(False)
    return list(folder)


def _check_fit(model: nn.Module, folder: AdapterFolder, path: str) -> None:
    layers = _packed_layers(model)
    misfit = (
        f"adapter {path}: made for the base {folder.base_name}, it doesn't fit {_name_of(model)}"
    )
    missing = [module for module in folder if module not in layers]
    if missing:
        others = {name for name, _ in model.named_modules()}
        dense = [module for module in missing if module in others]
        why = f"{dense[0]} isn't quantized there" if dense else f"there is no layer {missing[0]}"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise AdapterError(f"{misfit}: {why}{more}")
    for module, (out_features, _, in_features) in folder.shapes.items():
        expected = (layers[module].out_features, layers[module].in_features)
        if (out_features, in_features) != expected:
            raise AdapterError(f"{misfit}: {module}: expected an adapter of [{expected[0]}, {expected[1]}], "
                               f"got one of [{out_features}, {in_features}]")  # fmt: skip
    if folder.record is None:  # peft's own: nothing more is known of its base
        return
    made_for, here = folder.record.base, describe_base(model, _name_of(model))
    if made_for.architecture != here.architecture:
        raise AdapterError(
            f"{misfit}: the two models have different linear layers beside the adapter's"
        )
    difference = made_for.difference(here)
    if difference:
        logger.warning("adapter %s: %s", path, difference)
