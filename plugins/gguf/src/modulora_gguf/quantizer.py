"""GGUF's types behind the contract: a packed tensor of bytes. The types are in reference.py.

Packed tensors::

    blocks    uint8 [out, row bytes]    the rows of a GGUF tensor, as they are in a file
    scale     fp32 [1]                  of NVFP4 only: a factor of the whole weight, which files
                                        have in a tensor of its own

Metadata: ``type``, a name such as ``"Q4_K"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, reduce
from operator import or_
from typing import Any, ClassVar, Literal

import torch
from modulora_kernels import KernelQuantizer
from modulora_kernels.scalar_grid import Grid, ScalarGrid, with_tensors
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core.errors import CheckpointError, PluginError, ShapeError, WeightError
from modulora_core.spec import Calibration, PackedWeight, TensorLayout, column_importance
from modulora_core.tiles import tile_ranges
from modulora_gguf import SPEC, packing, reference
from modulora_gguf.grids import GRIDS, BlockGrid

REFERENCE_BYTES = 2**20
"""Bytes of fp32 weights that are packed at once: Q4_K needs about eight copies of them."""

_FP16 = 0x7C
"""The exponent of fp16, in its high byte."""

_FIRST: Mapping[int, int] = {1: _FP16}
_SCALES: Mapping[str, Mapping[int, int]] = {
    "Q4_1": {1: _FP16, 3: _FP16}, "Q5_1": {1: _FP16, 3: _FP16},
    "Q2_K": {81: _FP16, 83: _FP16}, "Q3_K": {109: _FP16}, "Q4_K": {1: _FP16, 3: _FP16},
    "Q5_K": {1: _FP16, 3: _FP16}, "Q6_K": {209: _FP16}, "TQ1_0": {53: _FP16}, "TQ2_0": {65: _FP16},
    "MXFP4": {0: 0xFF}, "NVFP4": dict.fromkeys(range(4), 0x7F),
}  # fmt: skip
"""Bytes of a block in which all bits of a mask are set if a scale is not finite; others: _FIRST."""

Type = Literal[
    "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
]  # fmt: skip


class Options(BaseModel):
    """The type of the blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Type = Field(
        "Q4_0",
        description=f"llama.cpp's name of the type; weights are packed to "
        f"{', '.join(packing.QUANTIZE)}, and other types are only read. Types in _K need "
        "in_features that 256 divides",
    )


class GGUF(KernelQuantizer, ScalarGrid):
    """Blocks of 32 or 256 weights with scales of their own, as llama.cpp stores them."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options
    kernels = "modulora_gguf.kernels"
    row_tensors = ("blocks",)

    def column_block(self, packed: PackedWeight) -> int | None:
        return reference.block_of(packed.metadata["type"])[0]

    @property
    def wants_calibration(self) -> bool:
        return self.options.type in packing.WEIGHTED

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises ShapeError: the type's blocks do not divide the rows, or it is only read."""
        super().check_shape(shape)
        type = self.options.type
        weights, _ = reference.block_of(type)
        if shape[1] % weights:
            raise ShapeError(
                f"{SPEC.name}: type {type}: in_features {shape[1]} is not a multiple of {weights}"
            )
        if type not in packing.QUANTIZE:
            raise ShapeError(
                f"{SPEC.name}: expected a type that weights are packed to "
                f"({', '.join(packing.QUANTIZE)}), got {type}, which is only read"
            )

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            ShapeError: as :meth:`check_shape`, or a second moment that doesn't fit.
            WeightError: NaN or Inf in it, or values whose scales fp16 can't hold.
        """
        out_features, in_features = weight.shape
        self.check_shape((out_features, in_features))
        _check_range(weight, self.options.type)
        importance = column_importance(SPEC.name, weight, calibration)
        packed = self.layout((out_features, in_features)).empty(weight.device)
        blocks, size = packed.tensors["blocks"], reference.block_of(self.options.type)[0]
        for start, stop in tile_ranges(out_features, 4 * in_features, REFERENCE_BYTES):
            W = weight.detach()[start:stop].to(torch.float32).contiguous()
            weights = importance.expand_as(W).reshape(-1, size)
            made = packing.QUANTIZE[self.options.type](W.view(-1, size), weights)
            blocks[start:stop] = made.view(stop - start, -1)
        return packed

    def check_values(self, packed: PackedWeight, subject: str) -> None:
        check_scales(packed.tensors["blocks"], self.options.type, subject)

    @staticmethod
    @lru_cache(maxsize=256)  # a model has few shapes, lookups as many as batches have lengths
    def tensors(shape: tuple[int, int], type: Type) -> dict[str, TensorLayout]:
        Options(type=type)
        weights, nbytes = reference.block_of(type)
        if shape[1] % weights:
            raise ValueError(f"in_features {shape[1]} is not a multiple of {weights}")
        blocks = TensorLayout("uint8", (shape[0], shape[1] // weights * nbytes))
        scale = {"scale": TensorLayout("float32", (1,))} if type == reference.SCALED else {}
        return {"blocks": blocks, **scale}

    def reference_tile(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        return reference.tile(packed, rows)

    @property
    def snaps(self) -> bool:
        return self.options.type in GRIDS

    def grid(self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
        grid, (size, nbytes) = _grid(packed), reference.block_of(packed.metadata["type"])
        first, stop = columns[0] // size, -(-columns[1] // size)
        blocks = packed.tensors["blocks"][slice(*rows), first * nbytes : stop * nbytes]
        found = grid.scales(blocks.reshape(-1, nbytes))
        weights = size // found[0].shape[1]  # of a part
        part = torch.arange(*columns, device=packed.device) // weights - first * size // weights
        scale, offset = (each.reshape(len(blocks), -1)[:, part] for each in found)
        return Grid(grid.levels(packed.device), scale, offset=offset)

    def codes(self, packed: PackedWeight) -> Tensor:
        blocks = packed.tensors["blocks"].view(-1, reference.block_of(packed.metadata["type"])[1])
        return _grid(packed).codes(blocks).view(packed.shape)

    def with_codes(self, packed: PackedWeight, codes: Tensor) -> PackedWeight:
        size, nbytes = reference.block_of(packed.metadata["type"])
        blocks = packed.tensors["blocks"]
        made = _grid(packed).with_codes(blocks.view(-1, nbytes), codes.reshape(-1, size))
        return with_tensors(packed, blocks=made.view(blocks.shape))


def _grid(packed: PackedWeight) -> BlockGrid:
    type = packed.metadata["type"]
    if type not in GRIDS:
        raise PluginError(
            f"{SPEC.name}: expected a type that snaps, one of {', '.join(GRIDS)}, got {type}"
        )
    return GRIDS[type]


def _check_range(weight: Tensor, type: Type) -> None:
    """Refuse values whose scales fp16 can't hold, or holds with less than five bits."""
    low, high = packing.STEPS[type] * 2.0**-20, 65504.0
    largest = max(map(abs, map(float, weight.detach().aminmax())))
    if largest != 0 and not low <= largest < high:
        raise WeightError(
            f"{SPEC.name}: type {type}: expected finite weights with a largest magnitude from "
            f"{low:.1g} to {high:g}, which fp16 scales can hold, got {largest:g} in a weight of "
            f"shape {list(weight.shape)}"
        )


def check_scales(blocks: Tensor, type: str, subject: str) -> None:
    """Refuse ``blocks``, uint8 ``[rows, row bytes]``, with a scale that is NaN or infinite.

    Raises:
        CheckpointError: there is one.
    """
    if blocks.is_meta or not blocks.numel():
        return
    if bool(damaged(blocks, type).any()):
        raise CheckpointError(
            f"{subject}: expected finite scales of blocks, got NaN or Inf; download the file again"
        )


def damaged(blocks: Tensor, type: str) -> Any:
    """Whether a scale is NaN or infinite, for each block of uint8 ``[rows, row bytes]``; on a CPU
    an array of NumPy, else a tensor.

    A number of BF16 is a scale of its own.
    """
    if type == "BF16":
        return (blocks.contiguous().view(torch.int16) & 0x7F80) == 0x7F80
    b: Any = blocks.reshape(-1, reference.block_of(type)[1])
    if b.device.type == "cpu":
        b = b.numpy()  # takes bytes out of blocks in half of torch's time
    if type == "IQ1_M":  # four words hold four bits of d each
        return ((b[:, 55] & 0x70) == 0x70) & ((b[:, 53] & 0xC0) == 0xC0)
    found = [(b[:, at] & mask) == mask for at, mask in _SCALES.get(type, _FIRST).items()]
    return reduce(or_, found)
