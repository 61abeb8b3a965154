"""LoRA adapters on a model of packed layers: made, saved and loaded.

    y = x Ŵᵀ + s (x Aᵀ) Bᵀ        s = α / r        A : [r, in], random        B : [out, r], zero at first

Each packed linear layer that is chosen becomes a LoRALinear in its place; the rest is frozen. The files are
PEFT's (:mod:`modulora_core.peft_format`): `peft` uses an adapter trained here on the dense model, and one
trained there is used here on a packed one.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from modulora_core.adapter_record import AdapterRecord, BaseRecord, describe_base
from modulora_core.errors import AdapterError, ModelError, OptionError
from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.peft_format import AdapterDelta, AdapterFolder, adapter_deltas, write_adapter

__all__ = [
    "AdapterDelta",
    "AdapterFolder",
    "LoRASettings",
    "adapter_deltas",
    "adapter_layers",
    "add_lora",
    "load_adapter",
    "save_adapter",
]

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
"""The target that means every packed linear layer."""


@dataclass(frozen=True, slots=True)
class LoRASettings:
    """What an adapter is made of. The defaults are the paper's (arXiv 2309.16119), but for the targets.

    Attributes:
        rank: r.
        alpha: α; the adapter is scaled by α / r.
        dropout: probability with which an input of the adapter is left out in training.
        targets: names: a layer is chosen if its path is the name or ends with ``.name``, as in PEFT; or
            ``"all-linear"``: every packed linear layer.
        seed: of A's random values.

    Raises:
        OptionError: a value is out of range.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = (ALL_LINEAR,)
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise OptionError(f"targets: expected a tuple of names, got the string {self.targets!r}")
        if self.rank < 1:
            raise OptionError(f"rank: expected at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if not self.targets:
            raise OptionError(f"targets: expected {ALL_LINEAR!r} or names of layers, got none")


def add_lora(
    model: nn.Module, settings: LoRASettings, name: str = "default", *, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Put a new adapter on ``model``'s packed layers, in place, and freeze everything else.

    Args:
        model: its linear layers are QuantLinear.
        settings: the same settings give the same values of A on one kind of device.
        name: one model may carry several adapters.
        dtype: of A and B. They train in fp32 whatever the activations are.

    Returns:
        the paths of the layers that it is on.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: a target is no packed layer; the message has near misses.
    """
    modules = _select(_packed_layers(model), settings.targets, model)
    devices = {layer.weight.device for layer in modules.values()}
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        torch.manual_seed(settings.seed)
        for path in modules:
            layer = _as_lora(model, path)
            layer.add_adapter(
                name, settings.rank, alpha=settings.alpha, dropout=settings.dropout, dtype=dtype
            )
    _train_only(model, name)
    return list(modules)


def adapter_layers(model: nn.Module, name: str = "default") -> Iterator[tuple[str, LoRALinear]]:
    """The layers that carry the adapter ``name``, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and name in module.lora_A:
            yield path, module


def _packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ModelError(f"{_name_of(model)}: expected a model with packed linear layers, found none; "
                         "run `modulora quantize` on it first")  # fmt: skip
    return layers


def _name_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _matches(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _select(
    layers: dict[str, QuantLinear], targets: Sequence[str], model: nn.Module
) -> dict[str, QuantLinear]:
    if ALL_LINEAR in targets:
        return layers
    for target in targets:
        if not any(_matches(path, target) for path in layers):
            raise AdapterError(_unknown_target(target, list(layers), model))
    return {
        path: layer for path, layer in layers.items() if any(_matches(path, target) for target in targets)
    }


def _unknown_target(target: str, layers: list[str], model: nn.Module) -> str:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and _matches(path, target):
            return f"target {target!r}: {path} is not quantized, and only packed layers take an adapter"
    names = sorted({path.rpartition(".")[2] for path in layers})
    near = difflib.get_close_matches(target, [*names, *layers], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"target {target!r}: no packed layer of that name{hint} (expected {', '.join(names)}, a path, or "
        f"{ALL_LINEAR})"
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
        layer.lora_A[name].requires_grad_(True)
        layer.lora_B[name].requires_grad_(True)


def save_adapter(
    model: nn.Module,
    out: str | Path,
    *,
    base: str,
    name: str = "default",
    settings: LoRASettings | None = None,
) -> None:
    """Write an adapter in PEFT's format, with ``modulora.json`` beside it.

    Args:
        model: with the adapter on it.
        out: a folder; it may exist, and an adapter in it is replaced. Without ``adapter_config.json``, which
            is written last, it is no adapter.
        base: the name of the model before it was quantized, for ``base_model_name_or_path``.
        name: which of the model's adapters.
        settings: what the adapter was made of, to be recorded.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    layers = dict(adapter_layers(model, name))
    if not layers:
        raise AdapterError(f"adapter {name!r}: {_name_of(model)} has none of that name")
    deltas = {
        path: AdapterDelta(layer.lora_A[name].data, layer.lora_B[name].data, layer.scale[name])
        for path, layer in layers.items()
    }
    write_adapter(
        Path(out),
        deltas,
        AdapterRecord(describe_base(model, base), asdict(settings) if settings else {}),
        target_modules=_target_modules(model, list(layers)),
        dropout=next(iter(layers.values())).dropout,
        fan_in_fan_out=any(_was_conv1d(model, path) for path in layers),
    )


def _target_modules(model: nn.Module, paths: list[str]) -> list[str]:
    """The shortest names that select exactly ``paths`` by PEFT's rule: last parts, or else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    selected = {path for path, _ in model.named_modules() if any(_matches(path, name) for name in names)}
    return names if selected == set(paths) else sorted(paths)


def _was_conv1d(model: nn.Module, path: str) -> bool:
    """Whether the dense model has GPT-2's transposed Conv1D at ``path``, by the checkpoint's record."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    record = getattr(config, "record", None)
    if record is None or f"{path}.weight" not in record.weights:
        return False
    return bool(record.sites[record.weights[f"{path}.weight"]].kind == "conv1d")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Put a saved adapter on ``model``'s packed layers, in place, and freeze everything else.

    Args:
        model: its linear layers are QuantLinear. It may be another quantization of the adapter's base than
            the one that it was trained on: then a warning is logged.
        path: a folder that :func:`save_adapter` or `peft` wrote, or a Hub id.
        name: one model may carry several adapters.
        trainable: whether its A and B train.
        dtype: of A and B.

    Returns:
        the paths of the layers that it is on.

    Raises:
        ModelError: the model has no packed layers.
        AdapterError: it isn't a LoRA adapter that can be used, or it doesn't fit this model: the message says
            which base it was made for, and the layer and shapes that differ.
    """
    folder = AdapterFolder(path)
    _check_fit(model, folder, str(path))
    for module, delta in folder.items():
        layer = _as_lora(model, module)
        dropout = float(folder.config.get("lora_dropout") or 0.0)
        layer.add_adapter(name, delta.rank, alpha=delta.scale * delta.rank, dropout=dropout, dtype=dtype)
        layer.lora_A[name].data.copy_(delta.A)
        layer.lora_B[name].data.copy_(delta.B)
        layer.scale[name] = delta.scale
    if trainable:
        _train_only(model, name)
    else:
        model.requires_grad_(False)
    return list(folder)


def _check_fit(model: nn.Module, folder: AdapterFolder, path: str) -> None:
    layers = _packed_layers(model)
    misfit = f"adapter {path}: made for the base {folder.base_name}, it doesn't fit {_name_of(model)}"
    missing = [module for module in folder if module not in layers]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        dense = [m for m in missing if isinstance(dict(model.named_modules()).get(m), nn.Linear)]
        why = f"{dense[0]} isn't quantized there" if dense else f"there is no packed layer {missing[0]}{more}"
        raise AdapterError(f"{misfit}: {why}")
    for module, (out_features, _, in_features) in folder.shapes.items():
        expected = (layers[module].out_features, layers[module].in_features)
        if (out_features, in_features) != expected:
            raise AdapterError(f"{misfit}: {module}: expected an adapter of [{expected[0]}, {expected[1]}], "
                               f"got one of [{out_features}, {in_features}]")  # fmt: skip
    if folder.record is None:
        return
    made_for, here = folder.record.base, describe_base(model, _name_of(model))
    if made_for.architecture != here.architecture:
        raise AdapterError(f"{misfit}: the two models have different linear layers beside the adapter's")
    _warn_of_another_base(path, made_for, here)


def _warn_of_another_base(path: str, made_for: BaseRecord, here: BaseRecord) -> None:
    if made_for.dense_weights != here.dense_weights:
        logger.warning(
            "adapter %s: made for the base %s; %s has its shapes and other weights: results will differ",
            path, made_for.name, here.name,
        )  # fmt: skip
    elif made_for.quantizers != here.quantizers:
        logger.warning(
            "adapter %s: trained on %s quantized with %s, used on it quantized with %s: results may differ",
            path, made_for.name, made_for.quantized_with, here.quantized_with,
        )  # fmt: skip
