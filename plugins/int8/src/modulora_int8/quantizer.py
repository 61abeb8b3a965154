"""INT8 behind the contract: options, packed tensors, and which code runs where.

    tensors         codes     int8 [out, in]
                    scales    fp32 [out, groups]       the absmax; one group is the whole row without group_size
    metadata        group_size
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core import kernels
from modulora_core.errors import WeightError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, Quantizer, TensorLayout, check_rows
from modulora_core.tiles import tile_bytes, tile_ranges
from modulora_int8 import SPEC, reference

FEW_ROWS = 24
"""Up to so many rows of x the fused kernel is faster than a matrix product over decoded tiles (README, Speed)."""


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int | None = Field(
        None, ge=2, description="how many consecutive weights of a row share a scale; by default the whole row"
    )


class INT8(Quantizer):
    """Absmax quantization to 8 bits (LLM.int8, arXiv 2208.07339); row-wise it is bitsandbytes' format."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002 - data-free
        """Quantize. Raises WeightError when ``weight`` has NaN or Inf."""
        weight = weight.detach()
        out_features, in_features = weight.shape
        group = self.options.group_size
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=weight.device)
        scales = torch.empty(out_features, reference.groups(in_features, group), device=weight.device)
        # a few rows at a time: the reference needs several fp32 copies of what it is given
        for start, stop in tile_ranges(out_features, 4 * in_features, tile_bytes(weight.device)):
            codes[start:stop], scales[start:stop] = reference.quantize(weight[start:stop], group)
        if not bool(scales.isfinite().all()):
            raise WeightError(f"int8: expected finite weights, got NaN or Inf in a weight of shape {list(weight.shape)}")
        tensors = {"codes": codes, "scales": scales}
        return PackedWeight("int8", self.format, (out_features, in_features), tensors, self.options.model_dump())

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        groups = reference.groups(shape[1], self.options.group_size)
        tensors = {"codes": TensorLayout("int8", shape), "scales": TensorLayout("float32", (shape[0], groups))}
        return PackedLayout("int8", self.format, shape, tensors, self.options.model_dump())

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        check_rows(packed, rows)
        codes, scales = packed.tensors["codes"], packed.tensors["scales"]
        cpu = _kernels(packed.device)
        if cpu is None:
            part = slice(*rows)
            return reference.dequantize(codes[part], scales[part], packed.metadata["group_size"]).to(dtype)

        def fill(start: int, stop: int, out: Tensor) -> None:
            assert cpu is not None
            kernels.launch(cpu.dequantize, codes[start:stop], scales[start:stop], _group(packed), out)

        return kernels.filled_tile(fill, rows, packed.shape[1], dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        out_features, in_features = packed.shape
        cpu = _kernels(packed.device)
        flat = None if cpu is None else kernels.few_rows(x, out_features if transpose else in_features, FEW_ROWS)
        if cpu is None or flat is None:
            return super().matmul(x, packed, transpose)
        y = torch.empty(flat.shape[0], in_features if transpose else out_features)
        kernel = cpu.matmul_transposed if transpose else cpu.matmul
        kernels.launch(kernel, packed.tensors["codes"], packed.tensors["scales"], _group(packed), flat, y)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def _kernels(device: torch.device) -> Any:
    """The module of compiled kernels; None for other devices, and without numba."""
    return kernels.load("modulora_int8.cpu", device)


def _group(packed: PackedWeight) -> int:
    """Columns that share a scale."""
    return packed.metadata["group_size"] or max(1, packed.shape[1])
