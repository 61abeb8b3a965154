"""NF4 behind the contract: options, packed tensors, tiles. The method is in reference.py.

Packed tensors::

    codes           uint8 [ceil(out · in / 2)]      two codes a byte, the even element high
    absmax          fp32 [blocks]                   without double quantization
    absmax_codes    uint8 [blocks]                  with it: codes of the dynamic map,
    nested_absmax   fp32 [ceil(blocks / 256)]       their constants,
    offset          fp32 [1]                        and the mean that was taken off

Metadata: ``block_size`` and ``double_quant``.
"""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar

import torch
from modulora_kernels import KernelQuantizer
from modulora_kernels.scalar_grid import Grid, ScalarGrid, with_tensors
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from modulora_core.errors import WeightError
from modulora_core.spec import Calibration, PackedWeight, TensorLayout
from modulora_nf4 import SPEC, packing, reference
from modulora_nf4.reference import NESTED_BLOCK_SIZE

REFERENCE_BYTES = 4 * 2**20  # of fp32 weights that plain torch packs at once, in six copies


class Options(BaseModel):
    """How a weight is quantized."""

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


class NF4(KernelQuantizer, ScalarGrid):
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314), bit for bit as bitsandbytes stores it."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options
    kernels = "modulora_nf4.kernels"

    def pack(
        self,
        weight: Tensor,
        calibration: Calibration | None = None,  # noqa: ARG002 - data-free
    ) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            WeightError: NaN or Inf in it, or values that fp32 can't hold.
        """
        # at most one copy
        W = weight.detach().to(torch.float32, memory_format=torch.contiguous_format).contiguous()
        codes, c2 = self._quantize(W.view(-1), self.options.block_size)
        if c2.numel() and not bool(c2.max().isfinite()):  # NaN is larger than all numbers
            raise WeightError(
                f"{SPEC.name}: expected finite weights that fp32 can hold, got NaN or Inf in a "
                f"weight of shape {list(weight.shape)}"
            )
        tensors = {"codes": codes, "absmax": c2}
        if self.options.double_quant:
            q2, c1, mean = reference.double_quantize(c2)
            tensors = {"codes": codes, "absmax_codes": q2, "nested_absmax": c1, "offset": mean}
        return self.layout((weight.shape[0], weight.shape[1])).fill(tensors)

    def _quantize(self, W: Tensor, B: int) -> tuple[Tensor, Tensor]:
        """Bytes and block constants c₂ of the flat fp32 weight."""
        numel, blocks = W.numel(), reference.blocks(W.numel(), B)
        codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=W.device)
        c2 = torch.empty(blocks, dtype=torch.float32, device=W.device)
        if not self.run_on_cpu("quantize", W, B.bit_length() - 1, codes, c2):
            step = max(1, REFERENCE_BYTES // (4 * B)) * B  # an even number of elements
            for start in range(0, numel, step):
                stop = min(start + step, numel)
                q, constants = reference.quantize(W[start:stop], B)
                codes[start // 2 : (stop + 1) // 2] = packing.pack(q)
                c2[start // B : reference.blocks(stop, B)] = constants
        return codes, c2

    @staticmethod
    @cache
    def tensors(
        shape: tuple[int, int], block_size: int, double_quant: bool
    ) -> dict[str, TensorLayout]:
        Options(block_size=block_size, double_quant=double_quant)
        numel = math.prod(shape)
        blocks = reference.blocks(numel, block_size)
        codes = {"codes": TensorLayout("uint8", ((numel + 1) // 2,))}
        if not double_quant:
            return codes | {"absmax": TensorLayout("float32", (blocks,))}
        nested = reference.blocks(blocks, NESTED_BLOCK_SIZE)
        return codes | {
            "absmax_codes": TensorLayout("uint8", (blocks,)),
            "nested_absmax": TensorLayout("float32", (nested,)),
            "offset": TensorLayout("float32", (1,)),
        }

    def sliced(self, packed: PackedWeight, dim: int, start: int, stop: int) -> PackedWeight | None:
        """Cut between blocks; columns only if rows have whole blocks, and without double_quant."""
        (out_features, in_features), B = packed.shape, packed.metadata["block_size"]
        nested = packed.metadata["double_quant"]
        if dim == 0:
            first, last, unit = start * in_features, stop * in_features, max(B, 2)
            unit *= NESTED_BLOCK_SIZE if nested else 1
            if first % unit or (last % unit and stop < out_features):
                return None
            per = {"codes": 2, "absmax": B, "absmax_codes": B, "nested_absmax": unit}
            parts = dict(packed.tensors)  # with the offset of all
            for name in per.keys() & parts.keys():
                parts[name] = parts[name][first // per[name] : -(-last // per[name])]
            return self._part(packed, (stop - start, in_features), parts)
        if nested or any(n % max(B, 2) for n in (in_features, start, stop)):
            return None
        per = {"codes": 2, "absmax": B}
        parts = {
            name: t.view(out_features, -1)[:, start // per[name] : stop // per[name]].flatten()
            for name, t in packed.tensors.items()
        }
        return self._part(packed, (out_features, stop - start), parts)

    @staticmethod
    def _part(
        packed: PackedWeight, shape: tuple[int, int], tensors: dict[str, Tensor]
    ) -> PackedWeight:
        return PackedWeight(packed.quantizer, packed.format, shape, tensors, packed.metadata)

    def reference_tile(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        (_, in_features), B, tensors = packed.shape, packed.metadata["block_size"], packed.tensors
        begin, end = rows[0] * in_features, rows[1] * in_features
        first, stop = begin // B, reference.blocks(end, B)
        if packed.metadata["double_quant"]:
            q2, c1 = tensors["absmax_codes"], tensors["nested_absmax"][first // NESTED_BLOCK_SIZE :]
            c2 = reference.double_dequantize(q2[first:stop], c1, tensors["offset"], first)
        else:
            c2 = tensors["absmax"][first:stop]
        q = packing.unpack(tensors["codes"], begin, end)
        return reference.dequantize(q, c2, B, begin).reshape(rows[1] - rows[0], in_features)

    def grid(self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
        device, tensors = packed.device, packed.tensors
        element = torch.arange(*rows, device=device)[:, None] * packed.shape[1]
        block = (element + torch.arange(*columns, device=device)) // packed.metadata["block_size"]
        if packed.metadata["double_quant"]:
            c2 = reference.dynamic_map(device)[tensors["absmax_codes"][block].to(torch.int32)]
            c2 = c2 * tensors["nested_absmax"][block // NESTED_BLOCK_SIZE] + tensors["offset"]
        else:
            c2 = tensors["absmax"][block]
        return Grid(torch.tensor(reference.LEVELS, dtype=torch.float32, device=device), c2)

    def codes(self, packed: PackedWeight) -> Tensor:
        numel = math.prod(packed.shape)
        return packing.unpack(packed.tensors["codes"], 0, numel).view(packed.shape)

    def with_codes(self, packed: PackedWeight, codes: Tensor) -> PackedWeight:
        return with_tensors(packed, codes=packing.pack(codes.reshape(-1)))
