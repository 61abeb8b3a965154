"""``modulora.json``: identifies the base that an adapter was trained on.

PEFT's file has one path for it. Ours adds two digests, which do not depend on the quantizer. One is
of the architecture: names and shapes of linear layers. The other is of norms and biases, which stay
unquantized. Tuning during quantization changes these, so the record says if it was done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import TypedDict

from modulora_core.checkpoints.joined_rows import JoinedRows
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.distributed import whole
from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.lora.adapted import head_parameters
from modulora_core.packed_parameters import PackedParameter, PackedStack
from modulora_core.version import VERSION


class _Quantizer(TypedDict):
    quantizer: str
    options: dict[str, Any]


Dropout = Annotated[float, Field(ge=0, lt=1)]


class RecordedSettings(BaseModel):
    """The settings that made an adapter; only the dropout is used."""

    model_config = ConfigDict(frozen=True, extra="allow")

    dropout: Dropout | None = None


class BaseRecord(BaseModel):
    """The base of an adapter.

    Attributes:
        name: the model before quantization, a Hub id or a path.
        quantizers: each quantizer of the base: ``{"quantizer": name, "options": {...}}``.
        architecture: digest of the names and shapes of all linear layers, packed or not.
        dense_weights: digest of the one-dimensional parameters, rounded to bfloat16, without the
            head of a task.
        tuned: quantization tuned the one-dimensional parameters.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    quantizers: tuple[_Quantizer, ...]
    architecture: str
    dense_weights: str
    tuned: bool = False

    def difference(self, here: BaseRecord) -> str:
        """Describe how ``here``, of the same architecture, differs; "" if it does not."""
        same_weights = self.dense_weights == here.dense_weights
        if same_weights and self.quantizers == here.quantizers:
            return ""
        if not (same_weights or self.tuned or here.tuned):
            return (
                f"made for the base {self.name}; {here.name} has the same shapes and other "
                "weights: results will differ"
            )
        trained = f"trained on {self.name} quantized with {self._quantized_with()}"
        used = f"used on {here.name} quantized with {here._quantized_with()}"
        if same_weights:
            return f"{trained}, {used}: results may differ"
        # a tuning changes the weights, so that the digests cannot identify the model
        tuned = "both" if self.tuned and here.tuned else "the first" if self.tuned else "the second"
        return f"{trained}, {used}; quantization tuned the norms of {tuned}: results may differ"

    def _quantized_with(self) -> str:
        return ", ".join(_in_words(quantizer) for quantizer in self.quantizers) or "no quantizer"


class AdapterRecord(BaseModel):
    """The contents of ``modulora.json``.

    Attributes:
        format: 2 with channel scales, which older readers of format 1 would leave out; else 1.
        settings: the settings that made the adapter.
        channel_scales: there are channel scales beside A and B.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1, 2]
    kind: Literal["lora"] = "lora"
    core_version: str = VERSION
    base: BaseRecord
    settings: RecordedSettings = RecordedSettings()
    channel_scales: bool = False


def describe_base(
    model: nn.Module, name: str, checkpoint: PackedCheckpoint | None = None
) -> BaseRecord:
    """Describe ``model`` as a base, without its adapters.

    Args:
        model: a packed model.
        name: its name before quantization.
        checkpoint: the one whose outline ``model`` is, on the meta device.
    """
    packed = [each.packed_weight for each in model.modules() if isinstance(each, QuantLinear)]
    packed += [module.first for module in model.modules() if isinstance(module, PackedStack)]
    recipes = {
        json.dumps({"quantizer": q.spec.name, "options": q.options.model_dump(mode="json")},
                   sort_keys=True)
        for quantizer in {id(weight.quantizer): weight.quantizer for weight in packed}.values()
        for q in (quantizer.parts if isinstance(quantizer, JoinedRows) else (quantizer,))
    }  # fmt: skip
    record = record_of(model) if checkpoint is None else checkpoint.record
    return BaseRecord(
        name=name,
        quantizers=tuple(json.loads(recipe) for recipe in sorted(recipes)),
        architecture=_digest(_linear_shapes(model)),
        dense_weights=_digest(_dense_values(model, checkpoint)),
        tuned=record is not None and bool((record.calibration or {}).get("tuning")),
    )


def record_of(model: nn.Module) -> QuantizationRecord | None:
    """The record of the checkpoint that ``model`` was loaded from."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    record = getattr(config, "record", None)
    return record if isinstance(record, QuantizationRecord) else None


def _in_words(quantizer: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in quantizer["options"].items())
    return f"{quantizer['quantizer']} ({options})" if options else str(quantizer["quantizer"])


def _linear_shapes(model: nn.Module) -> Iterator[bytes]:
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | nn.Linear):
            yield f"{name} {module.out_features} {module.in_features}\n".encode()
        elif isinstance(module, Conv1D):
            yield f"{name} {module.weight.shape[1]} {module.weight.shape[0]}\n".encode()


def _dense_values(model: nn.Module, checkpoint: PackedCheckpoint | None) -> Iterator[bytes]:
    modules = list(model.modules())
    adapted = [module for module in modules if isinstance(module, LoRALinear)]
    packed = [module for module in modules if isinstance(module, PackedParameter)]
    others = {
        *(scale for m in adapted for scale in (*m.input_scale.values(), *m.output_scale.values())),
        *(tensor for module in packed for tensor in module.parameters()),
        *head_parameters(model).values(),  # they train, and belong to the adapter
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and parameter not in others:
            values = whole(parameter) if checkpoint is None else checkpoint.tensor(name)
            # bfloat16 gives the same bytes for a model in float32 and in bfloat16
            values = values.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            yield name.encode() + values.numpy().tobytes()


def _digest(parts: Iterator[bytes]) -> str:
    """SHA-256 of the sorted parts, so that the order of a model's modules does not matter."""
    return "sha256:" + hashlib.sha256(b"".join(sorted(parts))).hexdigest()
