"""NF4 behind the contract: options, packed tensors, and which code runs where.

    tensors         codes           uint8 [ceil(out · in / 2)]      two codes a byte, even element high
                    absmax          fp32 [blocks]                   without double quantization
                    absmax_codes    uint8 [blocks]                  with it: codes of the dynamic map,
                    nested_absmax   fp32 [ceil(blocks / 256)]       their constants,
                    offset          fp32 [1]                        and the mean that was taken off
    metadata        block_size, double_quant
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from modulora_core import kernels
from modulora_core.errors import WeightError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, Quantizer, TensorLayout, check_rows
from modulora_nf4 import SPEC, packing, reference
from modulora_nf4.reference import NESTED_BLOCK_SIZE

FEW_ROWS = 32
"""Up to so many rows of x the fused kernel is faster than a matrix product over decoded tiles (README, Speed)."""


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_size: int = Field(64, description="how many consecutive weights share a scale: a power of two, at least 2")
    double_quant: bool = Field(False, description="quantize the scales too, to 8 bits: 4.13 instead of 4.5 bits a weight")

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value < 2 or value & (value - 1):
            raise ValueError("expected a power of two, at least 2")
        return value


class NF4(Quantizer):
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314), bit for bit as bitsandbytes stores it."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002 - data-free
        """Quantize. Raises WeightError when ``weight`` has NaN or Inf."""
        options: Options = self.options
        codes, absmax = _quantize(weight.detach().to(torch.float32).reshape(-1), options.block_size)
        if not bool(absmax.isfinite().all()):
            raise WeightError(f"nf4: expected finite weights, got NaN or Inf in a weight of shape {list(weight.shape)}")
        tensors = {"codes": codes, "absmax": absmax}
        if options.double_quant:
            q2, c1, mean = reference.double_quantize(absmax)
            tensors = {"codes": codes, "absmax_codes": q2, "nested_absmax": c1, "offset": mean}
        out_features, in_features = weight.shape
        return PackedWeight("nf4", self.format, (out_features, in_features), tensors, options.model_dump())

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        options: Options = self.options
        numel = math.prod(shape)
        blocks = reference.blocks(numel, options.block_size)
        tensors = {"codes": TensorLayout("uint8", ((numel + 1) // 2,))}
        if options.double_quant:
            tensors["absmax_codes"] = TensorLayout("uint8", (blocks,))
            tensors["nested_absmax"] = TensorLayout("float32", (reference.blocks(blocks, NESTED_BLOCK_SIZE),))
            tensors["offset"] = TensorLayout("float32", (1,))
        else:
            tensors["absmax"] = TensorLayout("float32", (blocks,))
        return PackedLayout("nf4", self.format, shape, tensors, options.model_dump())

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        check_rows(packed, rows)
        in_features, size = packed.shape[1], packed.metadata["block_size"]
        cpu = _kernels(packed.device)

        def fill(start: int, stop: int, out: Tensor) -> None:
            begin, end = start * in_features, stop * in_features
            absmax = _absmax(packed, begin // size, reference.blocks(end, size))
            assert cpu is not None
            kernels.launch(cpu.dequantize, packed.tensors["codes"], absmax, begin // size, _shift(size), begin, out.view(-1))

        if cpu is not None:
            return kernels.filled_tile(fill, rows, in_features, dtype)
        begin, end = rows[0] * in_features, rows[1] * in_features
        q = packing.unpack(packed.tensors["codes"], begin, end)
        absmax = _absmax(packed, begin // size, reference.blocks(end, size))
        return reference.dequantize(q, absmax, size, begin).reshape(-1, in_features).to(dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        out_features, in_features = packed.shape
        cpu = _kernels(packed.device)
        flat = None if cpu is None else kernels.few_rows(x, out_features if transpose else in_features, FEW_ROWS)
        if cpu is None or flat is None:
            return super().matmul(x, packed, transpose)
        size = packed.metadata["block_size"]
        absmax = _absmax(packed, 0, reference.blocks(out_features * in_features, size))
        y = torch.empty(flat.shape[0], in_features if transpose else out_features)
        kernel = cpu.matmul_transposed if transpose else cpu.matmul
        kernels.launch(kernel, packed.tensors["codes"], absmax, _shift(size), flat, y)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def _kernels(device: torch.device) -> Any:
    """The module of compiled kernels; None for other devices, and without numba."""
    return kernels.load("modulora_nf4.cpu") if device.type == "cpu" else None


def _shift(size: int) -> int:
    return size.bit_length() - 1


def _quantize(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Bytes and block constants of the flat fp32 weight."""
    cpu = _kernels(flat.device)
    if cpu is None:
        q, c2 = reference.quantize(flat, size)
        return packing.pack(q), c2
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(reference.blocks(flat.numel(), size))
    kernels.launch(cpu.quantize, flat.contiguous(), _shift(size), codes, absmax)
    return codes, absmax


def _absmax(packed: PackedWeight, first: int, stop: int) -> Tensor:
    """The constants of blocks ``[first, stop)``, fp32."""
    tensors: Mapping[str, Tensor] = packed.tensors
    if "absmax" in tensors:
        return tensors["absmax"][first:stop]
    cpu = _kernels(packed.device)
    nested_first = first // NESTED_BLOCK_SIZE
    if cpu is None:
        c1 = tensors["nested_absmax"][nested_first:]
        # double_dequantize counts c1 from the constant of `first`
        return reference.double_dequantize(tensors["absmax_codes"][first:stop], c1, tensors["offset"], first)
    absmax = torch.empty(max(0, stop - first))
    dynamic_map = reference.dynamic_map()
    kernels.launch(
        cpu.dequantize_absmax, tensors["absmax_codes"], tensors["nested_absmax"], tensors["offset"], dynamic_map,
        _shift(NESTED_BLOCK_SIZE), first, absmax,
    )  # fmt: skip
    return absmax
