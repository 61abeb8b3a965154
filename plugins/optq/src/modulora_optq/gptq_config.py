"""The quantization config of a GPTQ folder: what holds for all layers, and for one (``dynamic``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from modulora_core.errors import ModelError

Model = TypeVar("Model", bound=BaseModel)

BITS = (2, 3, 4, 8)
WRITER_THAT_BORROWS = "gptqmodel:"
"""GPTQModel says so of itself in ``meta.quantizer``. It subtracts 1 from whole words of zeros, which its own reader undoes."""

_ELSEWHERE = {"rotation": "rotated weights", "activation": "quantized activations", "adapter": "an adapter in the config",
              "is_marlin_format": "Marlin's layout"}  # fmt: skip
"""Keys that change what the tensors mean, and what they say."""


class Layer(BaseModel):
    """How one layer is quantized."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bits: int = 4
    group_size: int = -1
    symmetric: bool = Field(True, alias="sym")
    act_order: bool = Field(False, alias="desc_act")
    pack_dtype: str = "int32"

    @field_validator("bits")
    @classmethod
    def _implemented(cls, value: int) -> int:
        if value not in BITS:
            raise ValueError(
                f"expected one of {', '.join(map(str, BITS))}, got {value}, which isn't implemented"
            )
        return value

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError(f"expected a positive number, or -1 for the whole row, got {value}")
        return value

    @field_validator("pack_dtype")
    @classmethod
    def _words(cls, value: str) -> str:
        if value.removeprefix("torch.") != "int32":
            raise ValueError(f"expected int32, got {value}, which isn't implemented")
        return value


class Config(Layer):
    """The config of a folder.

    Attributes:
        checkpoint_format: ``"gptq"`` (v1: zeros are stored less one) or ``"gptq_v2"``.
        dynamic: regular expression on module names → options that differ; with ``-:`` in front, not quantized.
        meta: who wrote it.
    """

    checkpoint_format: str = "gptq"
    dynamic: dict[str, dict[str, Any]] = Field(default_factory=dict)
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: dict[str, Any]) -> dict[str, Any]:
        for key, what in _ELSEWHERE.items():
            if data.get(key):
                raise ValueError(f"{key}: {what}, which isn't implemented")
        known = {key: value for key, value in data.items() if value is not None}
        return known | {
            "checkpoint_format": known.get("checkpoint_format") or known.get("format") or "gptq"
        }

    @field_validator("checkpoint_format")
    @classmethod
    def _format(cls, value: str) -> str:
        if value not in ("gptq", "gptq_v2"):
            raise ValueError(f"expected gptq or gptq_v2, got {value}, which isn't implemented")
        return value

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Raises ModelError naming what isn't implemented, or malformed."""
        if "bits" not in data:
            raise ModelError(
                "GPTQ config: expected bits, got none; the config isn't of a GPTQ folder, or damaged"
            )
        return _checked(cls, data, "GPTQ config")

    @property
    def stored_less_one(self) -> bool:
        return self.checkpoint_format == "gptq"

    @property
    def borrows(self) -> bool:
        """Whether zeros of 0 were borrowed for, so that they can be read."""
        writers = self.meta.get("quantizer") or ()
        names = [writers] if isinstance(writers, str) else writers
        return any(str(name).startswith(WRITER_THAT_BORROWS) for name in names)

    def layer(self, module: str) -> Layer | None:
        """What holds for a layer, by the first pattern that matches; None where it isn't quantized.

        Raises:
            ModelError: a pattern that isn't a regular expression, or options that aren't implemented.
        """
        for pattern, options in self.dynamic.items():
            try:
                matches = (
                    re.match(pattern.removeprefix("+:").removeprefix("-:"), module) is not None
                )
            except re.error as error:
                raise ModelError(
                    f"GPTQ config: dynamic {pattern!r}: expected a regular expression: {error}"
                ) from None
            if matches:
                if pattern.startswith("-:"):
                    return None
                mine = self.model_dump(by_alias=True, include=set(Layer.model_fields)) | options
                return _checked(Layer, mine, f"GPTQ config: dynamic {pattern!r}")
        return self


def _checked(model: type[Model], data: Mapping[str, Any], subject: str) -> Model:
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ModelError(f"{subject}: {'; '.join(problems)}") from None


def compose(
    layers: Mapping[str, Layer],
    kept: Sequence[str],
    checkpoint_format: str,
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """The config of a folder with these layers: the commonest options for all, ``dynamic`` for the others.

    Args:
        layers: dotted path → how it is quantized; kept: paths of layers that aren't.
        checkpoint_format: ``"gptq"`` or ``"gptq_v2"``; meta: who writes it.
    """
    kinds = list(layers.values())
    common = max(dict.fromkeys(kinds), key=kinds.count)
    in_blocks = [path for path in kept if any(part.isdigit() for part in path.split("."))]
    dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(path)}$": {} for path in in_blocks}
    for path, layer in layers.items():
        if layer != common:
            dynamic[f"+:^{re.escape(path)}$"] = layer.model_dump(
                by_alias=True, exclude={"pack_dtype"}
            )
    config: dict[str, Any] = {
        "quant_method": "gptq", **common.model_dump(by_alias=True), "checkpoint_format": checkpoint_format,
        "format": checkpoint_format, "lm_head": any(not any(p.isdigit() for p in path.split(".")) for path in layers),
        "meta": dict(meta),
    }  # fmt: skip
    return config | ({"dynamic": dynamic} if dynamic else {})
