"""Half-quadratic quantization behind the contract: options, packed tensors, tiles and products.

Packed tensors::

    codes     uint8 [out, row_bytes(in, bits)]    in planes (modulora_half_quadratic.packing)
    scales    fp16 [out, groups]
    offsets   fp16 [out, groups]
    unit      fp32 [1]                            a power of two: Ŵ = (scale · code + offset) · unit

Metadata: ``bits`` and ``group_size``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import modulora_kernels as kernels
import torch
from pydantic import BaseModel
from torch import Tensor

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

PACKED_AT_ONCE = 2**18
"""Bytes of fp32 weights that are quantized at once. Caches hold the ten copies that this takes."""


class HalfQuadratic(Quantizer):
    """Half-quadratic quantization (HQQ, Badri and Shaji 2023): no data, 1 to 8 bits, offsets."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(
        self,
        weight: Tensor,
        calibration: Calibration | None = None,  # noqa: ARG002 - data-free
    ) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            WeightError: NaN, Inf, or magnitudes of 2¹²⁰ or more.
        """
        options: Options = self.options
        out_features, in_features = weight.shape
        W = weight.detach().to(torch.float32)
        unit = reference.unit(W)
        if not bool(unit.isfinite()):
            raise WeightError(
                f"{SPEC.name}: expected finite weights below {reference.LARGEST_WEIGHT:.2g}, got "
                f"others in a weight of shape {list(weight.shape)}"
            )
        packed = self.layout((out_features, in_features)).empty(weight.device)
        tensors = packed.tensors
        for start, stop in tile_ranges(out_features, 4 * in_features, PACKED_AT_ONCE):
            q, s, b = reference.quantize((W[start:stop] / unit).contiguous(), options)
            tensors["codes"][start:stop] = packing.pack(q, options.bits)
            tensors["scales"][start:stop], tensors["offsets"][start:stop] = s, b
        tensors["unit"].copy_(unit)
        return packed

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        metadata = self.options.model_dump(include={"bits", "group_size"})
        return PackedLayout(SPEC.name, self.format, shape, _tensors(shape, **metadata), metadata)

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        super().check_format(packed)
        kernels.check_layout(packed, _tensors)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        kernels.check_tensors(packed, _tensors)
        cpu = kernels.load("modulora_half_quadratic.cpu", packed.device)
        if cpu is not None:
            tile: Tensor = cpu.tile(packed, rows, dtype)
            return tile
        parts = {name: tensor[slice(*rows)] for name, tensor in packed.tensors.items()}
        codes = packing.unpack(parts["codes"], packed.metadata["bits"], packed.shape[1])
        s, b = (parts[name].float() * packed.tensors["unit"] for name in ("scales", "offsets"))
        return reference.dequantize(codes, s, b, packed.metadata["group_size"]).to(dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        kernels.check_tensors(packed, _tensors)
        cpu = kernels.load("modulora_half_quadratic.cpu", packed.device)
        y: Tensor | None = None if cpu is None else cpu.product(x, packed, transpose)
        return super().matmul(x, packed, transpose) if y is None else y

    @property
    def snaps(self) -> bool:
        return True

    def snap(
        self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int], V: Tensor
    ) -> Tensor:
        q, s, b = self._nearest(packed, rows, columns, V)
        return q * s + b

    def snapped(self, packed: PackedWeight, V: Tensor) -> PackedWeight:
        out_features, in_features = packed.shape
        q, _, _ = self._nearest(packed, (0, out_features), (0, in_features), V)
        codes = packing.pack(q.to(torch.uint8), packed.metadata["bits"])
        return packed.layout.fill({**packed.tensors, "codes": codes})

    def _nearest(
        self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int], V: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The codes nearest to V, with the scale and the offset of each."""
        group = torch.arange(*columns, device=V.device) // packed.metadata["group_size"]
        tensors, unit = packed.tensors, packed.tensors["unit"]
        s, b = (tensors[name][slice(*rows)][:, group].float() for name in ("scales", "offsets"))
        q = reference.nearest(V / unit, s, b, 2 ** packed.metadata["bits"] - 1)
        return q, s * unit, b * unit


@cache
def _tensors(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, TensorLayout]:
    """The packed tensors of a weight of this shape. Raises ValueError for invalid options."""
    options, (out_features, in_features) = Options(bits=bits, group_size=group_size), shape
    groups: Any = TensorLayout("float16", (out_features, options.groups(in_features)))
    return {
        "codes": TensorLayout("uint8", (out_features, packing.row_bytes(in_features, bits))),
        "scales": groups,
        "offsets": groups,
        "unit": TensorLayout("float32", (1,)),
    }
