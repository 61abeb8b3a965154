"""NF4 behind the contract: options, packed tensors, and which code runs where.

Packed tensors::

    codes           uint8 [ceil(out · in / 2)]      two codes a byte, even element high
    absmax          fp32 [blocks]                   without double quantization
    absmax_codes    uint8 [blocks]                  with it: codes of the dynamic map,
    nested_absmax   fp32 [ceil(blocks / 256)]       their constants,
    offset          fp32 [1]                        and the mean that was taken off

Metadata: ``block_size`` and ``double_quant``.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
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
from modulora_nf4 import SPEC, packing, reference
from modulora_nf4.reference import NESTED_BLOCK_SIZE

FEW_ROWS = 64
"""Up to so many rows of x the fused kernel is faster than a product over decoded tiles (README, Speed)."""

_NESTED = ("absmax_codes", "nested_absmax", "offset")

REFERENCE_BYTES = 4 * 2**20
"""fp32 weights that the reference packs at once: it needs about six copies of what it is given."""


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_size: int = Field(
        64, description="how many consecutive weights share a scale: a power of two up to 2**30"
    )
    double_quant: bool = Field(
        False, description="quantize the scales to 8 bits: 4.13 instead of 4.5 bits a weight"
    )

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if not 1 <= value <= 2**30 or value & (value - 1):
            raise ValueError("expected a power of two from 1 to 2**30")
        return value


class NF4(Quantizer):
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314), bit for bit as bitsandbytes stores it."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002 - data-free
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            WeightError: it has NaN or Inf, or values that fp32 can't hold.
        """
        options: Options = self.options
        # in one copy where strides and dtype are not those of the kernel, and in none where they are
        W = weight.detach().to(torch.float32, memory_format=torch.contiguous_format).contiguous()
        codes, absmax = _quantize(W.view(-1), options.block_size)
        # NaN is larger than all numbers, for torch too
        if absmax.numel() and not bool(absmax.max().isfinite()):
            raise WeightError(
                "nf4: expected finite weights that fp32 can hold, got NaN or Inf in a weight of shape "
                f"{list(weight.shape)}"
            )
        tensors = {"codes": codes, "absmax": absmax}
        if options.double_quant:
            q2, c1, mean = _double_quantize(absmax)
            tensors = {"codes": codes, "absmax_codes": q2, "nested_absmax": c1, "offset": mean}
        out_features, in_features = weight.shape
        return PackedWeight(
            "nf4", self.format, (out_features, in_features), tensors, options.model_dump()
        )

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        options = self.options.model_dump()
        return PackedLayout("nf4", self.format, shape, _tensors(shape, **options), options)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        gpu = _gpu(packed.device)
        if gpu is not None:
            kernels.check_tensors(packed, _tensors)
            tile: Tensor = gpu.dequantize(packed, rows, dtype)
            return tile
        cpu = _kernels(packed.device)
        if cpu is None:
            return _reference_tile(packed, rows).to(dtype)
        decoded: Tensor = _rows(cpu, packed).tile(_operands(packed), rows, packed.shape[1], dtype)
        return decoded

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        gpu = _gpu(packed.device)
        if gpu is not None:
            kernels.check_tensors(packed, _tensors)
            product: Tensor | None = gpu.matmul(x, packed, transpose)
            if product is not None:
                return product
        cpu = _kernels(packed.device)
        y: Tensor | None = None
        if cpu is not None:
            weight = partial(_operands, packed)
            y = _rows(cpu, packed).product(x, packed.shape, weight, FEW_ROWS, transpose)
        return super().matmul(x, packed, transpose) if y is None else y


def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they can't run, and then the reference does."""
    return kernels.load("modulora_nf4.cpu", device)


def _gpu(device: torch.device) -> Any:
    """The Triton kernels; None where they can't run."""
    return kernels.load_triton("modulora_nf4.gpu", device)


@cache
def _tensors(
    shape: tuple[int, int], block_size: int, double_quant: bool
) -> dict[str, TensorLayout]:
    """What a weight of this shape is packed into. Raises ValueError for options that can't be."""
    Options(block_size=block_size, double_quant=double_quant)
    numel = math.prod(shape)
    blocks = reference.blocks(numel, block_size)
    codes = {"codes": TensorLayout("uint8", ((numel + 1) // 2,))}
    if not double_quant:
        return codes | {"absmax": TensorLayout("float32", (blocks,))}
    return codes | {
        "absmax_codes": TensorLayout("uint8", (blocks,)),
        "nested_absmax": TensorLayout("float32", (reference.blocks(blocks, NESTED_BLOCK_SIZE),)),
        "offset": TensorLayout("float32", (1,)),
    }


def _shift(B: int) -> int:
    """Element ``i`` is in block ``i >> shift``."""
    return B.bit_length() - 1


def _quantize(W: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Bytes ``[ceil(numel / 2)]`` and block constants ``[blocks]`` of the flat fp32 weight ``[numel]``."""
    codes = torch.empty((W.numel() + 1) // 2, dtype=torch.uint8, device=W.device)
    absmax = torch.empty(reference.blocks(W.numel(), B), device=W.device)
    cpu = _kernels(W.device)
    if cpu is not None:
        kernels.launch(cpu.quantize, W, _shift(B), codes, absmax)
        return codes, absmax
    step = max(1, REFERENCE_BYTES // (4 * B)) * B  # whole blocks, and an even number of elements
    for start in range(0, W.numel(), step):
        stop = min(start + step, W.numel())
        q, c2 = reference.quantize(W[start:stop], B)
        codes[start // 2 : (stop + 1) // 2] = packing.pack(q)
        absmax[start // B : reference.blocks(stop, B)] = c2
    return codes, absmax


def _double_quantize(c2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`modulora_nf4.reference.double_quantize` gives."""
    cpu = _kernels(c2.device)
    if cpu is None:
        return reference.double_quantize(c2)
    q2 = torch.empty(c2.numel(), dtype=torch.uint8)
    c1, mean = (
        torch.empty(reference.blocks(c2.numel(), NESTED_BLOCK_SIZE)),
        reference.mean_of(c2).reshape(1),
    )
    kernels.launch(cpu.double_quantize, c2, mean, q2, c1)
    return q2, c1, mean


def _reference_tile(packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
    """Rows ``[start, stop)`` in fp32, by plain torch."""
    kernels.check_tensors(packed, _tensors)
    in_features, B = packed.shape[1], packed.metadata["block_size"]
    begin, end = rows[0] * in_features, rows[1] * in_features
    q = packing.unpack(packed.tensors["codes"], begin, end)
    absmax = _reference_absmax(packed, begin // B, reference.blocks(end, B))
    return reference.dequantize(q, absmax, B, begin).reshape(rows[1] - rows[0], in_features)


def _reference_absmax(packed: PackedWeight, first: int, stop: int) -> Tensor:
    """The constants of blocks ``[first, stop)``, fp32."""
    if "absmax" in packed.tensors:
        return packed.tensors["absmax"][first:stop]
    q2, c1, mean = (packed.tensors[name] for name in _NESTED)
    return reference.double_dequantize(
        q2[first:stop], c1[first // NESTED_BLOCK_SIZE :], mean, first
    )


def _rows(cpu: Any, packed: PackedWeight) -> Any:
    """The kernels for a weight's form."""
    return cpu.rows if "absmax" in packed.tensors else cpu.nested_rows


def _operands(packed: PackedWeight) -> tuple[Any, ...]:
    """What they need: codes, absmax or what it is made of, shift, and the length of a row."""
    return kernels.operands(packed, _stored)


def _stored(packed: PackedWeight) -> tuple[Any, ...]:
    kernels.check_tensors(packed, _tensors)
    tensors, shift = packed.tensors, _shift(packed.metadata["block_size"])
    names = ("absmax",) if "absmax" in tensors else _NESTED
    return tensors["codes"], *(tensors[name] for name in names), shift, packed.shape[1]
