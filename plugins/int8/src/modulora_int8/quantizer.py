"""INT8 behind the contract: options, packed tensors, tiles. The method is in reference.py.

Packed tensors::

    codes     int8 [out, in]          CB, from −127 to 127
    scales    fp32 [out, groups]      c, the largest magnitude of a group

Metadata: ``group_size``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from modulora_kernels import KernelQuantizer
from modulora_kernels.scalar_grid import Grid, ScalarGrid, with_tensors
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core.errors import WeightError
from modulora_core.spec import Calibration, PackedWeight, TensorLayout
from modulora_core.tiles import tile_ranges
from modulora_int8 import SPEC, reference

REFERENCE_BYTES = 4 * 2**20
"""Bytes of fp32 weights that plain torch packs at once: it needs about six copies of them."""


class Options(BaseModel):
    """How a weight is quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int | None = Field(
        None,
        ge=2,
        description="how many consecutive weights of a row share a scale, 2 or more; "
        "by default the whole row",
    )

    def group(self, in_features: int) -> int:
        """Columns of a group in a weight of so many columns, at least 1."""
        return self.group_size or max(1, in_features)


class INT8(KernelQuantizer, ScalarGrid):
    """Absmax quantization to 8 bits (LLM.int8, arXiv 2208.07339); row-wise as in bitsandbytes."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options
    kernels = "modulora_int8.kernels"
    row_tensors = ("codes", "scales")

    def column_block(self, packed: PackedWeight) -> int | None:
        """The group; of scales for whole rows, :meth:`sliced` cuts the codes alone."""
        size: int | None = packed.metadata["group_size"]
        return None if size is None or packed.shape[1] % size else size

    def sliced(self, packed: PackedWeight, dim: int, start: int, stop: int) -> PackedWeight | None:
        if dim == 0 or packed.metadata["group_size"] is not None:
            return super().sliced(packed, dim, start, stop)
        parts = {**packed.tensors, "codes": packed.tensors["codes"][:, start:stop]}
        return self.layout((packed.shape[0], stop - start)).fill(parts)

    def pack(
        self,
        weight: Tensor,
        calibration: Calibration | None = None,  # noqa: ARG002 - data-free
    ) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            WeightError: NaN or Inf in it, or values from 2.6e36 on, whose 127-fold fp32 can't hold.
        """
        out_features, in_features = weight.shape
        # at most one copy
        W = weight.detach().to(torch.float32, memory_format=torch.contiguous_format).contiguous()
        packed = self.layout((out_features, in_features)).empty(W.device)
        codes, scales = packed.tensors["codes"], packed.tensors["scales"]
        if not self.run_on_cpu("quantize", W, self.options.group(in_features), codes, scales):
            for start, stop in tile_ranges(out_features, 4 * in_features, REFERENCE_BYTES):
                CB, c = reference.quantize(W[start:stop], self.options.group_size)
                codes[start:stop], scales[start:stop] = CB, c
        if not bool((reference.LARGEST * scales).isfinite().all()):
            raise WeightError(
                f"{SPEC.name}: expected finite weights below 2.6e36, got others in a weight of "
                f"shape {list(weight.shape)}"
            )
        return packed

    @staticmethod
    @lru_cache(maxsize=256)  # a model has few shapes, lookups as many as batches have lengths
    def tensors(shape: tuple[int, int], group_size: int | None) -> dict[str, TensorLayout]:
        Options(group_size=group_size)
        out_features, in_features = shape
        groups = reference.groups(in_features, group_size)
        return {
            "codes": TensorLayout("int8", (out_features, in_features)),
            "scales": TensorLayout("float32", (out_features, groups)),
        }

    def reference_tile(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        CB, c = (packed.tensors[name][slice(*rows)] for name in ("codes", "scales"))
        return reference.dequantize(CB, c, packed.metadata["group_size"])

    def grid(self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
        size = Options(**packed.metadata).group(packed.shape[1])
        group = torch.arange(*columns, device=packed.device) // size
        c = packed.tensors["scales"][slice(*rows)][:, group]
        levels = torch.arange(256, dtype=torch.uint8, device=packed.device).view(torch.int8)
        return Grid(levels.to(torch.float32), c * reference.INVERSE)

    def codes(self, packed: PackedWeight) -> Tensor:
        return packed.tensors["codes"].view(torch.uint8)

    def with_codes(self, packed: PackedWeight, codes: Tensor) -> PackedWeight:
        return with_tensors(packed, codes=codes.view(torch.int8))
