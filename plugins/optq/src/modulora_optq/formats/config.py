"""The quantization config of a GPTQ folder: options of all layers, and of some (``dynamic``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

from modulora_core.errors import ModelError, OptionError
from modulora_core.models.json_files import matches
from modulora_core.options import validate_model
from modulora_optq.options import SMALLEST_GROUP, WHOLE_ROW

Model = TypeVar("Model", bound=BaseModel)

BORROWING_WRITER = "gptqmodel:"
"""GPTQModel's name in ``meta.quantizer``. It subtracts one from whole words of zeros."""

_NOT_IMPLEMENTED = ("rotation", "activation", "adapter", "is_marlin_format")
"""Keys that give the tensors another meaning."""


class Layer(BaseModel):
    """How a layer is quantized, by the names of the files."""

    model_config = ConfigDict(frozen=True)

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = WHOLE_ROW
    sym: bool = True
    desc_act: bool = False
    pack_dtype: Literal["int32"] = "int32"

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value != WHOLE_ROW and value < SMALLEST_GROUP:
            raise ValueError(f"expected {SMALLEST_GROUP} or more, or {WHOLE_ROW}")
        return value

    def group(self, columns: int) -> int:
        """Columns of a group in a weight of so many."""
        return columns if self.group_size == WHOLE_ROW else self.group_size


class Config(Layer):
    """The config of a folder.

    Attributes:
        checkpoint_format: ``"gptq"`` (v1: zeros are stored less one) or ``"gptq_v2"``.
        dynamic: regular expression on module names → options that differ; with ``-:`` in front,
            these modules are dense.
        meta: the writers, in ``"quantizer"``.
    """

    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    dynamic: dict[str, dict[str, Any]] = {}
    meta: dict[str, Any] = {}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Read a config. Raises ModelError if it is malformed or not implemented."""
        if "bits" not in data:
            raise ModelError("GPTQ config: expected bits, got none; the config is damaged")
        for key in _NOT_IMPLEMENTED:
            if data.get(key):
                raise ModelError(f"GPTQ config: {key} {data[key]!r} is not implemented")
        older = {"checkpoint_format": data["format"]} if data.get("format") else {}
        return _checked(cls, older | {k: v for k, v in data.items() if v is not None}, "")

    @property
    def stores_less_one(self) -> bool:
        return self.checkpoint_format == "gptq"

    @property
    def borrows(self) -> bool:
        """Whether zeros of 0 borrowed from their neighbours, so that they can be read."""
        writers = self.meta.get("quantizer") or ()
        names = writers if isinstance(writers, list) else [writers]
        return any(str(name).startswith(BORROWING_WRITER) for name in names)

    def layer(self, module: str) -> Layer | None:
        """The options of a layer by the first pattern that matches; None if the layer is dense.

        Raises:
            ModelError: the pattern is no regular expression, or its options are not implemented.
        """
        for pattern, options in self.dynamic.items():
            subject = f": dynamic {pattern!r}"
            try:
                selected = matches(pattern.removeprefix("+:").removeprefix("-:"), module)
            except ValueError as error:
                raise ModelError(f"GPTQ config: dynamic: {error}") from None
            if selected and pattern.startswith("-:"):
                return None
            if selected:
                return _checked(Layer, self.model_dump() | options, subject)
        return self


def compose(
    layers: Mapping[str, Layer], dense: Sequence[str], checkpoint_format: str, writers: list[str]
) -> dict[str, Any]:
    """The config of a folder: the commonest options for all layers, ``dynamic`` for the others.

    Args:
        layers: dotted path → options.
        dense: dotted paths of layers that are not quantized.
        checkpoint_format: ``"gptq"`` or ``"gptq_v2"``.
        writers: for ``meta.quantizer``.
    """
    kinds = list(layers.values())
    common = max(dict.fromkeys(kinds), key=kinds.count)
    dynamic = {f"-:^{re.escape(path)}$": dict[str, Any]() for path in dense if _in_block(path)}
    for path, layer in layers.items():
        if layer != common:
            dynamic[f"+:^{re.escape(path)}$"] = layer.model_dump(exclude={"pack_dtype"})
    config = {
        "quant_method": "gptq", **common.model_dump(), "checkpoint_format": checkpoint_format,
        "format": checkpoint_format, "lm_head": not all(map(_in_block, layers)),
        "meta": {"quantizer": writers},
    }  # fmt: skip
    return config | ({"dynamic": dynamic} if dynamic else {})


def _in_block(path: str) -> bool:
    """Whether a layer is in a decoder block, by a number in its path."""
    return any(part.isdigit() for part in path.split("."))


def _checked(model: type[Model], data: Mapping[str, Any], subject: str) -> Model:
    known = {key: value for key, value in data.items() if key in model.model_fields}
    if "pack_dtype" in known:
        known["pack_dtype"] = str(known["pack_dtype"]).removeprefix("torch.")
    try:
        return validate_model(f"GPTQ config{subject}", model, known)
    except OptionError as error:
        raise ModelError(f"{error}; anything else is not implemented") from None
