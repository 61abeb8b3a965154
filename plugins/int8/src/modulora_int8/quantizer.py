"""INT8 behind the contract: options, packed tensors, and which code runs where.

Packed tensors::

    codes     int8 [out, in]
    scales    fp32 [out, groups]      the absmax; without group_size a row is one group

Metadata: ``group_size``.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
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
from modulora_int8 import SPEC, reference

FEW_ROWS = 64
"""Up to so many rows of x the fused kernel is faster than a product with decoded tiles (README, Speed)."""

REFERENCE_BYTES = 4 * 2**20
"""fp32 weights that the reference packs at once: it needs about six copies of what it is given."""


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int | None = Field(
        None,
        ge=2,
        description="how many consecutive weights of a row share a scale, 2 or more; by default the whole row",
    )


class INT8(Quantizer):
    """Absmax quantization to 8 bits (LLM.int8, arXiv 2208.07339); row-wise it is bitsandbytes' format."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002 - data-free
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            WeightError: it has NaN, Inf, or values beyond 2.6e36, of which fp32 can't hold 127 times.
        """
        # in one copy where strides and dtype are not those of the kernel, and in none where they are
        W = weight.detach().to(torch.float32, memory_format=torch.contiguous_format).contiguous()
        codes, scales = _quantize(W, self.options.group_size)
        if not bool((reference.LARGEST * scales).isfinite().all()):
            raise WeightError(
                f"int8: expected finite weights below 2.6e36, got others in a weight of shape {list(weight.shape)}"
            )
        out_features, in_features = weight.shape
        tensors = {"codes": codes, "scales": scales}
        options = self.options.model_dump()
        return PackedWeight("int8", self.format, (out_features, in_features), tensors, options)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        options = self.options.model_dump()
        return PackedLayout("int8", self.format, shape, _tensors(shape, **options), options)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        kernels.check_tensors(packed, _tensors)
        return _decode(packed, rows, dtype)

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` of Ŵ, ``[*ids.shape, in]``: their codes and scales are gathered, a byte a weight, and decoded as one tile.

        Raises:
            IndexError: an id below 0, or beyond the last row.
        """
        kernels.check_tensors(packed, _tensors)
        out_features, in_features = packed.shape
        flat = ids.detach().reshape(-1).to(torch.int64)  # [n]
        if flat.numel():
            low, high = (int(end) for end in flat.aminmax())
            if low < 0 or high >= out_features:
                raise IndexError(f"ids of rows of a [{out_features}, {in_features}] table: expected 0 to {out_features - 1}, got "
                                 f"{low} to {high}")  # fmt: skip
        rows = {
            name: tensor.detach().index_select(0, flat) for name, tensor in packed.tensors.items()
        }
        table = PackedWeight("int8", packed.format, (len(flat), in_features), rows, packed.metadata)
        return _decode(table, (0, len(flat)), dtype).view(*ids.shape, in_features)

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
            weight = partial(kernels.operands, packed, _operands)
            y = cpu.rows.product(x, packed.shape, weight, FEW_ROWS, transpose)
        return super().matmul(x, packed, transpose) if y is None else y


def _decode(packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of Ŵ, which are there, of tensors that were checked."""
    gpu = _gpu(packed.device)
    if gpu is not None:
        tile: Tensor = gpu.dequantize(packed, rows, dtype)
        return tile
    cpu = _kernels(packed.device)
    if cpu is None:
        codes, scales = (packed.tensors[name][slice(*rows)] for name in ("codes", "scales"))
        return reference.dequantize(codes, scales, packed.metadata["group_size"]).to(dtype)
    decoded: Tensor = cpu.rows.tile(
        kernels.operands(packed, _operands), rows, packed.shape[1], dtype
    )
    return decoded


def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they can't run, and then the reference does."""
    return kernels.load("modulora_int8.cpu", device)


def _gpu(device: torch.device) -> Any:
    """The Triton kernels; None where they can't run."""
    return kernels.load_triton("modulora_int8.gpu", device)


@lru_cache(maxsize=256)  # a model has few shapes; lookups have as many as batches have lengths
def _tensors(shape: tuple[int, int], group_size: int | None) -> dict[str, TensorLayout]:
    """What a weight of this shape is packed into. Raises ValueError for options that can't be."""
    Options(group_size=group_size)
    out_features, in_features = shape
    scales = (out_features, reference.groups(in_features, group_size))
    return {
        "codes": TensorLayout("int8", (out_features, in_features)),
        "scales": TensorLayout("float32", scales),
    }


def _operands(packed: PackedWeight) -> tuple[Any, ...]:
    """What the decoder needs: codes, scales, and how many columns share a scale."""
    kernels.check_tensors(packed, _tensors)
    group = packed.metadata["group_size"] or max(1, packed.shape[1])
    return packed.tensors["codes"], packed.tensors["scales"], group


def _quantize(W: Tensor, G: int | None) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` and scales ``[out, groups]`` of the fp32 weight ``[out, in]``."""
    out_features, in_features = W.shape
    codes = torch.empty(out_features, in_features, dtype=torch.int8, device=W.device)
    scales = torch.empty(out_features, reference.groups(in_features, G), device=W.device)
    cpu = _kernels(W.device)
    if cpu is not None:
        kernels.launch(cpu.quantize, W, G or max(1, in_features), codes, scales)
        return codes, scales
    for start, stop in tile_ranges(out_features, 4 * in_features, REFERENCE_BYTES):
        codes[start:stop], scales[start:stop] = reference.quantize(W[start:stop], G)
    return codes, scales
