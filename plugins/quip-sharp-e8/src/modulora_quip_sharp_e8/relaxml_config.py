"""What config.json of QuIP#'s published checkpoints says, and refuses: ``quip_params``, and the sizes that fused layers are cut by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from modulora_core.errors import ModelError
from modulora_quip_sharp_e8.codebooks import RESIDUAL_SCALE

KEY = "quip_params"


@dataclass(frozen=True, slots=True)
class Codebook:
    """A codebook as published.

    Attributes:
        bits: of a weight.
        id: what each layer says in ``codebook_id``.
        version: what ``codebook_version`` of the config must be.
    """

    bits: Literal[2, 3, 4]
    id: int
    version: int

    @property
    def residual_scale(self) -> float | None:
        """What the residual's points are divided by; None without residual."""
        return RESIDUAL_SCALE.get(self.bits)


CODEBOOKS: Mapping[str, Codebook] = {
    "E8P12": Codebook(2, 7, 1),
    "E8P12RVQ3B": Codebook(3, 18, 0),
    "E8P12RVQ4B": Codebook(4, 17, 1),
}
"""By the name in the config."""


class QuipParams(BaseModel):
    """``quip_params`` of config.json. What isn't known here may change what the tensors mean, and is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codebook: str
    codebook_version: int
    lora_rank: int = 0
    rescale: bool = Field(False, alias="rescale_WH")
    codesz: int = 8
    packsz: float | None = None
    idx_dtype: str = "torch.int64"
    resid_scale_override: float | None = -1

    @field_validator("codebook")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in CODEBOOKS:
            raise ValueError(
                f"expected one of {', '.join(CODEBOOKS)}, got {value}, which isn't implemented"
            )
        return value

    @field_validator("lora_rank")
    @classmethod
    def _no_lora(cls, value: int) -> int:
        if value != 0:
            raise ValueError(
                f"expected 0, got {value}: low-rank terms beside the codes aren't implemented"
            )
        return value

    @field_validator("rescale")
    @classmethod
    def _no_rescale(cls, value: bool) -> bool:
        if value:
            raise ValueError("expected false, got true: rescaled layers aren't implemented")
        return value

    @field_validator("codesz")
    @classmethod
    def _eight(cls, value: int) -> int:
        if value != 8:
            raise ValueError(f"expected 8, the weights in a code, got {value}")
        return value

    @field_validator("idx_dtype")
    @classmethod
    def _words(cls, value: str) -> str:
        if value.removeprefix("torch.") != "int64":
            raise ValueError(f"expected torch.int64, got {value}, which isn't implemented")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> QuipParams:
        book = self.book
        if self.codebook_version != book.version:
            raise ValueError(
                f"codebook_version: expected {book.version} for {self.codebook}, got {self.codebook_version}, "
                "which isn't implemented"
            )
        packed = 8 / book.bits  # codes in a word of 64 bits, a code being of 8 weights
        if self.packsz is not None and not math.isclose(self.packsz, packed, rel_tol=1e-3):
            raise ValueError(
                f"packsz: expected {packed:.4g} for {self.codebook}, got {self.packsz:.4g}"
            )
        if self.resid_scale_override not in (None, -1, book.residual_scale):
            raise ValueError(
                f"resid_scale_override: expected -1 (the codebook's own: {book.residual_scale or 'it has no residual'}), "
                f"got {self.resid_scale_override}, which isn't implemented"
            )
        return self

    @property
    def book(self) -> Codebook:
        return CODEBOOKS[self.codebook]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> QuipParams:
        """From the whole config.json. Raises ModelError naming what isn't implemented, or malformed."""
        try:
            return cls.model_validate(config[KEY])
        except ValidationError as error:
            problems = [
                ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")])
                for e in error.errors()
            ]
            raise ModelError(f"{KEY} of config.json: {'; '.join(problems)}") from None


FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "upgate_proj": ("up_proj", "gate_proj"),
}
"""Layers that are stored as one, by its name, in the order of its rows."""


def part_sizes(config: Mapping[str, Any], fused: str) -> tuple[int, ...]:
    """How many rows each of :data:`FUSED` has of the whole.

    Raises:
        ModelError: config.json doesn't say.
    """
    if fused == "upgate_proj":
        return (_size(config, "intermediate_size"),) * 2
    heads = _size(config, "num_attention_heads")
    keys = _size(config, "num_key_value_heads", heads)
    head = _size(config, "head_dim", _size(config, "hidden_size") // heads)
    return heads * head, keys * head, keys * head


def _size(config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = otherwise
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{name} of config.json: expected a positive whole number, by which fused layers are cut, got {value!r}"
        )
    return value


HADAMARD_ORDERS = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)
"""Orders K other than 1 in the order that the published weights' transform tries them in: the first such that n / K is a power of two."""


def check_dimension(layer: str, what: str, n: int) -> None:
    """Refuse a dimension whose transform needs a Hadamard matrix that isn't determined by its order.

    Raises:
        ModelError: ``n`` isn't a power of two.
    """
    if n & (n - 1) == 0:
        return
    k = next((k for k in HADAMARD_ORDERS if n % k == 0 and (n // k) & (n // k - 1) == 0), None)
    needs = (
        "no matrix of theirs fits it"
        if k is None
        else f"they were made with the Hadamard matrix had.{k} of Sloane's tables (n = {k} · {n // k}), which isn't here; another "
        "one of its order would give other weights"
    )
    raise ModelError(
        f"{layer}: {what} {n} isn't a power of two, and published weights of such layers can't be read: {needs}. Quantize the "
        "original model instead: `modulora quantize MODEL OUT -q quip-sharp-e8`"
    )
