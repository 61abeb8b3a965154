"""config.json of QuIP#'s published checkpoints: ``quip_params``, and the sizes of fused layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator

from modulora_core.errors import ModelError
from modulora_core.models.json_files import check_json
from modulora_quip_sharp_e8.codebooks import BLOCK, RESIDUAL_SCALE

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "upgate_proj": ("up_proj", "gate_proj"),
}
"""The parts of a layer that is stored as one, in the order of its rows."""


class Codebook(NamedTuple):
    """A published codebook: bits of a weight, ``codebook_id``, ``codebook_version``."""

    bits: Literal[2, 3, 4]
    id: int
    version: int


CODEBOOKS = {
    "E8P12": Codebook(2, 7, 1),
    "E8P12RVQ3B": Codebook(3, 18, 0),
    "E8P12RVQ4B": Codebook(4, 17, 1),
}


class QuipParams(BaseModel):
    """``quip_params`` of config.json. An unknown key may change the tensors' meaning: refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codebook: str
    codebook_version: int
    lora_rank: int = 0
    rescale_WH: bool = False  # noqa: N815
    codesz: int = BLOCK
    packsz: float | None = None
    idx_dtype: str = "torch.int64"
    resid_scale_override: float | None = -1

    @model_validator(mode="after")
    def _implemented(self) -> QuipParams:
        if self.codebook not in CODEBOOKS:
            raise ValueError(
                f"codebook: expected one of {', '.join(CODEBOOKS)}, got {self.codebook}"
            )
        book = self.book
        own = RESIDUAL_SCALE.get(book.bits)
        words = 8 / book.bits  # codes of a word
        packed = self.packsz is None or math.isclose(self.packsz, words, rel_tol=1e-3)
        version = f"{book.version} for {self.codebook}"
        expected = (
            ("codebook_version", self.codebook_version == book.version, version),
            ("lora_rank", self.lora_rank == 0, "0"),
            ("rescale_WH", not self.rescale_WH, "false"),
            ("codesz", self.codesz == BLOCK, f"{BLOCK}, the weights in a code"),
            ("idx_dtype", self.idx_dtype in ("int64", "torch.int64"), "torch.int64"),
            ("packsz", packed, f"{words:.4g} for {self.codebook}"),
            (
                "resid_scale_override",
                self.resid_scale_override in (None, -1, own),
                f"-1 (the codebook's own: {own or 'it has no residual'})",
            ),
        )
        for name, holds, wanted in expected:
            if not holds:
                got = str(getattr(self, name)).lower()
                raise ValueError(f"{name}: expected {wanted}, got {got}, which isn't implemented")
        return self

    @property
    def book(self) -> Codebook:
        return CODEBOOKS[self.codebook]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> QuipParams:
        """From the whole config.json.

        Raises:
            ModelError: a value that is malformed or not implemented, by name.
        """
        return check_json(
            config["quip_params"],
            cls,
            "quip_params of config.json",
            error=ModelError,
            advice="this model isn't implemented",
        )


def part_sizes(config: Mapping[str, Any], layer: str) -> tuple[int, ...]:
    """The rows of each part of a fused layer, by config.json; nothing for another layer."""
    if layer not in FUSED:
        return ()
    if layer == "upgate_proj":
        return (_size(config, "intermediate_size"),) * 2
    heads = _size(config, "num_attention_heads")
    keys = _size(config, "num_key_value_heads", heads)
    head = _size(config, "head_dim", _size(config, "hidden_size") // heads)
    return heads * head, keys * head, keys * head


def _size(config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    value = otherwise if config.get(name) is None else config[name]
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{name} of config.json: expected a positive whole number, to cut fused layers by, "
            f"got {value!r}"
        )
    return value
