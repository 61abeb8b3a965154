"""Half-quadratic quantization behind the contract: packed tensors, and which code runs where.

Packed tensors::

    codes     uint8 [out, row_bytes(in, bits)]    as modulora_half_quadratic.packing arranges them
    scales    fp16 [out, groups]
    offsets   fp16 [out, groups]
    unit      fp32 [1]                            a power of two: Ŵ = (scale · code + offset) · unit

Metadata: ``bits`` and ``group_size``.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from modulora_core import kernels
from modulora_core.errors import WeightError
from modulora_core.spec import (
    Calibration,
    PackedLayout,
    PackedWeight,
    Quantizer,
    TensorLayout,
    check_rows,
)
from modulora_core.tiles import tile_ranges
from modulora_half_quadratic import SPEC, packing, reference
from modulora_half_quadratic.options import Options

FEW_ROWS = 64
"""Up to about so many rows of x the fused kernel is faster than a product with decoded tiles."""

PACKED_AT_ONCE = 2**18
"""Bytes of fp32 weights that are quantized at once. About ten copies of them are alive, which the caches should hold: four times
as many bytes take three times as long a weight."""


class HalfQuadratic(Quantizer):
    """Half-quadratic quantization (HQQ, Badri and Shaji 2023): data-free, 1 to 8 bits, an offset for each group."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002 - data-free
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            WeightError: it has NaN, Inf, or magnitudes of 2¹²⁰ or more.
        """
        options: Options = self.options
        shape = (weight.shape[0], weight.shape[1])
        W = weight.detach().to(torch.float32)
        unit = reference.unit(W)
        if not bool(unit.isfinite()):
            raise WeightError(
                f"{SPEC.name}: expected finite weights below {reference.LARGEST_WEIGHT:.2g}, got others in a weight of "
                f"shape {list(shape)}"
            )
        tensors = self.layout(shape).empty(weight.device).tensors
        for start, stop in tile_ranges(shape[0], 4 * shape[1], PACKED_AT_ONCE):
            q, s, b = reference.quantize((W[start:stop] / unit).contiguous(), options)
            tensors["codes"][start:stop] = packing.pack(q, options.bits)
            tensors["scales"][start:stop], tensors["offsets"][start:stop] = s, b
        tensors["unit"].copy_(unit)
        return PackedWeight(SPEC.name, self.format, shape, tensors, _metadata(options))

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        metadata = _metadata(self.options)
        return PackedLayout(SPEC.name, self.format, shape, _tensors(shape, **metadata), metadata)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        kernels.check_tensors(packed, _tensors)
        bits, G = packed.metadata["bits"], packed.metadata["group_size"]
        cpu = _kernels(packed.device)
        if cpu is None:
            codes, scales, offsets = _operands(packed, *rows)
            return reference.dequantize(
                packing.unpack(codes, bits, packed.shape[1]), scales, offsets, G
            ).to(dtype)

        def fill(start: int, stop: int, out: Tensor) -> None:
            cpu.rows.dequantize(_weight(packed, start, stop), 0, out)

        return kernels.filled_tile(fill, rows, packed.shape[1], dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """As the base class says; few rows on a CPU are multiplied while Ŵ is decoded, with fp32 sums."""
        cpu = _kernels(packed.device)
        y: Tensor | None = None
        if cpu is not None:
            weight = partial(_weight, packed, 0, packed.shape[0])
            y = cpu.rows.product(x, packed.shape, weight, FEW_ROWS, transpose)
        return super().matmul(x, packed, transpose) if y is None else y


def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they can't run, and then the reference does."""
    return kernels.load("modulora_half_quadratic.cpu", device)


def _metadata(options: Options) -> dict[str, Any]:
    return options.model_dump(include={"bits", "group_size"})


@cache
def _tensors(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, TensorLayout]:
    """What a weight of this shape is packed into. Raises ValueError for options that can't be."""
    options = Options(bits=bits, group_size=group_size)
    out_features, in_features = shape
    groups = TensorLayout("float16", (out_features, options.groups(in_features)))
    return {
        "codes": TensorLayout("uint8", (out_features, packing.row_bytes(in_features, bits))),
        "scales": groups,
        "offsets": groups,
        "unit": TensorLayout("float32", (1,)),
    }


def _operands(packed: PackedWeight, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[start, stop)``: bytes, and fp32 scales and offsets times the unit."""
    tensors = packed.tensors
    scales, offsets = (
        tensors[name][start:stop].to(torch.float32) * tensors["unit"]
        for name in ("scales", "offsets")
    )
    return tensors["codes"][start:stop], scales, offsets


def _weight(packed: PackedWeight, start: int, stop: int) -> tuple[Any, ...]:
    """The same as the kernels take it."""
    kernels.check_tensors(packed, _tensors)
    metadata = packed.metadata
    return (
        *_operands(packed, start, stop),
        metadata["bits"],
        metadata["group_size"],
        packed.shape[1],
    )
