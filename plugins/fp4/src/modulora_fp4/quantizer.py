"""FP4 behind the contract: options, packed tensors, tiles. The types are in reference.py.

Packed tensors::

    codes           uint8 [out, in / 2]    two elements a byte, the even one low
    scales          uint8 [out, in / k]    E8M0 (mxfp4, k = 32) or E4M3 (nvfp4, k = 16)
    global_scale    fp32 [1]               nvfp4: all scales are divided by it

Metadata: ``type``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

import modulora_kernels as kernels
import torch
from modulora_kernels import KernelQuantizer
from modulora_kernels.scalar_grid import Grid, ScalarGrid, with_tensors
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core.errors import CheckpointError, ShapeError, WeightError
from modulora_core.spec import Calibration, PackedWeight, TensorLayout, column_importance
from modulora_core.tiles import tile_ranges
from modulora_fp4 import SPEC, packing, reference

REFERENCE_BYTES = 2**20
"""Bytes of fp32 weights that are packed at once: the copies of a search fit a cache."""

Type = Literal["mxfp4", "nvfp4"]


class Options(BaseModel):
    """The type of the blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Type = Field(
        "mxfp4",
        description="mxfp4: 32 weights share a power of two, 4.25 bits; nvfp4: 16 weights share "
        "an 8-bit float, 4.5 bits",
    )


class FP4(KernelQuantizer, ScalarGrid):
    """MXFP4 (OCP Microscaling) and NVFP4: elements in E2M1 with a scale for each block."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options
    kernels = "modulora_fp4.kernels"
    row_tensors = ("codes", "scales")

    def column_block(self, packed: PackedWeight) -> int | None:
        return reference.BLOCK[packed.metadata["type"]]

    def check_shape(self, shape: tuple[int, int]) -> None:
        """As the base class. Raises ShapeError: blocks do not divide the rows."""
        super().check_shape(shape)
        size = reference.BLOCK[self.options.type]
        if shape[1] % size:
            raise ShapeError(
                f"{SPEC.name}: type {self.options.type}: in_features {shape[1]} is not a multiple "
                f"of {size}"
            )

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            ShapeError: as :meth:`check_shape`, or a second moment that doesn't fit.
            WeightError: NaN or Inf in it, or values beyond 2¹⁰².
        """
        out_features, in_features = weight.shape
        self.check_shape((out_features, in_features))
        largest = _largest(weight)
        importance = column_importance(SPEC.name, weight, calibration)
        packed = self.layout((out_features, in_features)).empty(weight.device)
        g = packed.tensors.get("global_scale")
        if g is not None:
            g.copy_(packing.global_scale(largest))
        codes, scales = packed.tensors["codes"], packed.tensors["scales"]
        for start, stop in tile_ranges(out_features, 4 * in_features, REFERENCE_BYTES):
            W = weight.detach()[start:stop].to(torch.float32).contiguous()
            self._quantize(W, importance, g, codes[start:stop], scales[start:stop])
        return packed

    def _quantize(
        self, W: Tensor, w: Tensor, g: Tensor | None, codes: Tensor, scales: Tensor
    ) -> None:
        """Fill codes and scales of whole rows; ``w`` weights the errors of columns."""
        kind = self.options.type
        largest = W.unflatten(1, (-1, reference.BLOCK[kind])).abs().amax(-1)
        scales.copy_(packing.rule(largest, g))
        steps = torch.tensor(packing.STEPS[kind], dtype=torch.int32, device=W.device)
        table = reference.block_scales(kind, torch.arange(256, device=W.device), g)
        module = kernels.load(f"{self.kernels}.cpu_packing", W.device)
        if module is not None:
            inverses = packing.reciprocals(table)
            most = packing.MOST[kind]
            kernels.launch(module.quantize, W, w, table, inverses, steps, most, codes, scales)
        else:
            P, X = packing.quantize(kind, W, w, g)
            codes[:], scales[:] = reference.pack(P), X

    def check_values(self, packed: PackedWeight, subject: str) -> None:
        scales = packed.tensors["scales"]
        if self.options.type == "mxfp4":  # E8M0: 255 is NaN, and products with more overflow
            bad = bool((scales > reference.LARGEST_EXPONENT + 127).any())
        else:
            bad = bool((scales & 127 == 127).any())
        if bad:
            raise CheckpointError(
                f"{subject}: expected finite scales of blocks, got NaN or Inf; download or "
                "quantize the model again"
            )

    @staticmethod
    @lru_cache(maxsize=256)  # a model has few shapes, lookups as many as batches have lengths
    def tensors(shape: tuple[int, int], type: Type) -> dict[str, TensorLayout]:
        Options(type=type)
        (rows, columns), size = shape, reference.BLOCK[type]
        if columns % size:
            raise ValueError(f"in_features {columns} is not a multiple of {size}")
        tensors = {
            "codes": TensorLayout("uint8", (rows, columns // 2)),
            "scales": TensorLayout("uint8", (rows, columns // size)),
        }
        if type == "nvfp4":
            tensors["global_scale"] = TensorLayout("float32", (1,))
        return tensors

    def reference_tile(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        codes, scales = (packed.tensors[name][slice(*rows)] for name in self.row_tensors)
        g = packed.tensors.get("global_scale")
        return reference.dequantize(packed.metadata["type"], codes, scales, g)

    def grid(self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
        kind, g = packed.metadata["type"], packed.tensors.get("global_scale")
        block = torch.arange(*columns, device=packed.device) // reference.BLOCK[kind]
        scales = packed.tensors["scales"][slice(*rows)][:, block]
        levels = torch.tensor(reference.LEVELS, dtype=torch.float32, device=packed.device)
        return Grid(levels, reference.block_scales(kind, scales, g))

    def codes(self, packed: PackedWeight) -> Tensor:
        return reference.unpack(packed.tensors["codes"])

    def with_codes(self, packed: PackedWeight, codes: Tensor) -> PackedWeight:
        return with_tensors(packed, codes=reference.pack(codes))


def _largest(weight: Tensor) -> Tensor:
    """The largest magnitude, fp32 ``[1]``. Raises WeightError: it isn't finite, or too large."""
    low, high = weight.detach().aminmax()
    largest = torch.maximum(-low, high).to(torch.float32).reshape(1)
    most = 2.0 ** (reference.LARGEST_EXPONENT + 2)
    if not bool(largest < most):
        raise WeightError(
            f"{SPEC.name}: expected finite weights below {most:.3g}, got {float(largest):g} in a "
            f"weight of shape {list(weight.shape)}"
        )
    return largest
