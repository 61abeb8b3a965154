"""``modulora.json``: which base an adapter was made for, in more words than PEFT's one path.

A base is named, and known by two digests. Both are the same however the base is quantized: one of its
architecture (names and shapes of its linear layers), one of what quantization leaves alone (norms, biases). Only
tuning, while it is quantized, changes the latter too; so that is recorded beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import modulora_core
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.errors import AdapterError
from modulora_core.layers import LoRALinear, QuantLinear

RECORD_FILE = "modulora.json"

_FORMAT = 1
_FORMAT_WITH_SCALES = 2
"""Readers of format 1 alone would leave the channel scales out, and so they are to refuse."""


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """Which base an adapter was made for.

    Attributes:
        name: the model before quantization, as it was named: a Hub id or a path.
        quantizers: each quantizer of the base: ``{"quantizer": name, "options": {...}}``.
        architecture: digest of the names and shapes of all linear layers, packed or not.
        dense_weights: digest of the one-dimensional parameters, rounded to bfloat16. It tells models of one
            architecture apart.
        tuned: those parameters were tuned while it was quantized, so they aren't the model's own.
    """

    name: str
    quantizers: tuple[Mapping[str, Any], ...]
    architecture: str
    dense_weights: str
    tuned: bool = False

    @property
    def quantized_with(self) -> str:
        """The quantizers in words, for messages."""
        return ", ".join(_in_words(q) for q in self.quantizers) or "no quantizer"

    def difference(self, here: BaseRecord) -> str:
        """How ``here`` differs from this base, which has its architecture, in words; "" if it doesn't."""
        if self.dense_weights != here.dense_weights:
            if self.tuned or here.tuned:
                return self._other_tuning(here)
            return (f"made for the base {self.name}; {here.name} has its shapes and other weights: "
                    "results will differ")  # fmt: skip
        if self.quantizers != here.quantizers:
            return (f"trained on {self.name} quantized with {self.quantized_with}, used on it quantized with "
                    f"{here.quantized_with}: results may differ")  # fmt: skip
        return ""

    def _other_tuning(self, here: BaseRecord) -> str:
        """Whether it is another model can't be told then, so it isn't said."""
        if self.tuned and here.tuned:
            whose = "of both were tuned while they were quantized, each its own way"
        else:
            whose = (
                f"of the {'first' if self.tuned else 'second'} were tuned while it was quantized"
            )
        return (f"trained on {self.name} quantized with {self.quantized_with}, used on {here.name} quantized with "
                f"{here.quantized_with}: the unquantized tensors {whose}: results may differ")  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """The contents of ``modulora.json``.

    Attributes:
        settings: what the adapter was made of.
        channel_scales: there are channel scales beside A and B.
    """

    base: BaseRecord
    settings: Mapping[str, Any] = field(default_factory=dict)
    core_version: str = ""
    channel_scales: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT_WITH_SCALES if self.channel_scales else _FORMAT,
            "kind": "lora",
            "core_version": self.core_version or modulora_core.__version__,
            "base": asdict(self.base),
            "settings": dict(self.settings),
            **({"channel_scales": True} if self.channel_scales else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> AdapterRecord:
        """Raises AdapterError: another format, or malformed."""
        if data.get("format") not in (_FORMAT, _FORMAT_WITH_SCALES):
            raise AdapterError(
                f"{where}: this version of modulora-core reads formats {_FORMAT} and {_FORMAT_WITH_SCALES} of "
                f"{RECORD_FILE}, got {data.get('format')!r}; install one that fits"
            )
        try:
            base = data["base"]
            quantizers = tuple(_quantizer(q["quantizer"], q["options"]) for q in base["quantizers"])
            tuned = bool(base.get("tuned", False))  # older ones don't say
            record = BaseRecord(
                base["name"], quantizers, base["architecture"], base["dense_weights"], tuned
            )
            scales = data["format"] == _FORMAT_WITH_SCALES and bool(data["channel_scales"])
            return cls(record, dict(data["settings"]), str(data["core_version"]), scales)
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"{where}: malformed {RECORD_FILE}: {error!r}") from None


def describe_base(model: nn.Module, name: str) -> BaseRecord:
    """The record of ``model`` as a base, adapters left aside. Reads the one-dimensional parameters only."""
    found = (m.weight.quantizer for m in model.modules() if isinstance(m, QuantLinear))
    recipes = {id(q): _quantizer(q.spec.name, q.options.model_dump(mode="json")) for q in found}
    distinct = {json.dumps(recipe, sort_keys=True): recipe for recipe in recipes.values()}
    quantizers = tuple(distinct[key] for key in sorted(distinct))
    record = record_of(model)
    tuned = record is not None and bool((record.calibration or {}).get("tuning"))
    return BaseRecord(
        name, quantizers, _digest(_linear_shapes(model)), _digest(_dense_values(model)), tuned
    )


def record_of(model: nn.Module) -> QuantizationRecord | None:
    """What the checkpoint says that ``model`` was loaded from."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    record = getattr(config, "record", None)
    return record if isinstance(record, QuantizationRecord) else None


def _quantizer(name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"quantizer": str(name), "options": dict(options)}


def _in_words(quantizer: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in quantizer["options"].items())
    return f"{quantizer['quantizer']} ({options})" if options else str(quantizer["quantizer"])


def _linear_shapes(model: nn.Module) -> Iterator[bytes]:
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | nn.Linear):
            yield f"{name} {module.out_features} {module.in_features}\n".encode()
        elif isinstance(module, Conv1D):
            yield f"{name} {module.weight.shape[1]} {module.weight.shape[0]}\n".encode()


def _dense_values(model: nn.Module) -> Iterator[bytes]:
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    scales = {
        id(scale) for m in adapted for scale in (*m.input_scale.values(), *m.output_scale.values())
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and id(parameter) not in scales:
            # one rounding to bfloat16 gives the same bytes whatever wider dtype the model is loaded in
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            yield name.encode() + values.numpy().tobytes()


def _digest(parts: Iterator[bytes]) -> str:
    """SHA-256 of the parts in the order of their bytes: the order of a model's modules doesn't matter."""
    return "sha256:" + hashlib.sha256(b"".join(sorted(parts))).hexdigest()
