"""Plan LoRA on dense weights, for comparison with a quantizer: ``modulora plan MODEL -q none``."""

# ruff: noqa: ARG002  # the contract's arguments

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from modulora_core.checkpoints.record import Recipe
from modulora_core.errors import PluginError
from modulora_core.registry import Choice
from modulora_core.spec import (
    PROTOCOL,
    Calibration,
    PackedLayout,
    PackedWeight,
    Quantizer,
    QuantizerSpec,
    TensorLayout,
)
from modulora_core.version import VERSION

NONE = Choice("none")
"""The choice that leaves every weight dense."""


class DenseWeights(Quantizer):
    """The quantizer of a plan without one: its layout is a dense weight of ``dtype``."""

    spec: ClassVar[QuantizerSpec] = QuantizerSpec(
        name=NONE.quantizer,
        summary="dense weights",
        location="modulora_planner.dense_weights:DenseWeights",
        protocol=PROTOCOL,
        bits=(32,),
    )

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._dtype = str(dtype).removeprefix("torch.")

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        tensors = {"weight": TensorLayout(self._dtype, shape)}
        return PackedLayout(self.spec.name, self.format, shape, tensors)

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        raise PluginError(f"{self.spec.name}: it packs nothing; name a quantizer")

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        raise PluginError(f"{self.spec.name}: it packs nothing; name a quantizer")


def recipe_of(quantizer: Quantizer) -> Recipe:
    """The recipe of a plugin's quantizer, or of :class:`DenseWeights`."""
    if not isinstance(quantizer, DenseWeights):
        return Recipe.of(quantizer)
    return Recipe(
        quantizer=quantizer.spec.name, options={}, distribution="modulora-core",
        version=VERSION, protocol=PROTOCOL,
    )  # fmt: skip
