"""QuIP# behind the contract. What a weight is packed into is in :mod:`modulora_quip_sharp_e8.packed_layout`, its products in
:mod:`modulora_quip_sharp_e8.products`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from modulora_core import kernels
from modulora_core.errors import OptionError, ShapeError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, Quantizer, check_rows
from modulora_core.tiles import tile_bytes, tile_ranges
from modulora_quip_sharp_e8 import SPEC, products, solver, transform
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.packed_layout import metadata_of, tensors_of, whole_shape
from modulora_quip_sharp_e8.reference import Solution


class QuIPSharpE8(Quantizer):
    """QuIP# with the E8P12 codebook (Tseng et al. 2024, arXiv 2402.04396)."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``, so that its product with the inputs that calibration saw changes little.

        Raises:
            OptionError: there is no calibration.
            ShapeError: its H isn't ``[in, in]``.
            WeightError: NaN or Inf in the weight or in H, or an H that can't be a second moment.
        """
        if calibration is None:
            raise OptionError(
                f"quip-sharp-e8: expected a calibration, got none for a weight of shape {list(weight.shape)}; it needs "
                "the second moment of the layer's inputs: give text to calibrate with"
            )
        options: Options = self.options
        # the solver works in fp64 for an fp64 weight, which would pack to other bytes than the same values in fp32
        weight = weight.to(torch.float32) if weight.dtype == torch.float64 else weight
        return from_solution(solver.solve(weight, calibration.hessian, options), options)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        options: Options = self.options
        metadata = metadata_of(options, [0, shape[0]])
        return PackedLayout(SPEC.name, self.format, shape, tensors_of(shape, **metadata), metadata)

    def rescaled(
        self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor
    ) -> PackedWeight:
        """The same codes between scales that are multiplied by these: exact but for the rounding of scales to fp16."""
        kernels.check_tensors(packed, tensors_of)
        if packed.shape[0] != len(packed.tensors["output_scale"]):
            raise ShapeError(f"quip-sharp-e8: a weight of shape {list(packed.shape)} is a part of a larger one of "
                             f"{len(packed.tensors['output_scale'])} rows and can't be rescaled alone")  # fmt: skip
        tensors = dict(packed.tensors)
        unit = tensors["scale"]
        for name, factor in (("input_scale", input_scale), ("output_scale", output_scale)):
            vector = tensors[name].to(torch.float32) * factor.to(unit)
            mean = (
                vector.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
            )  # keeps fp16 far from its ends
            tensors[name], unit = (vector / mean).to(torch.float16), unit * mean
        tensors["scale"] = unit
        return PackedWeight(packed.quantizer, packed.format, packed.shape, tensors, packed.metadata)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Rows of Ŵ in the original basis; in fp64 computed in fp64.

        Every row of Ŵ needs all of C: a strip of its columns at a time is decoded, rotated back, and left but for ``rows``. So this
        costs as much for one row as for all, and products never ask for it.
        """
        check_rows(packed, rows)
        kernels.check_tensors(packed, tensors_of)
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        start, (whole, columns) = packed.metadata["rows"][0], whole_shape(packed)
        out = torch.empty(rows[1] - rows[0], columns, dtype=computed, device=packed.device)
        if out.numel() == 0:
            return out.to(dtype)
        vectors = packed.tensors
        budget = tile_bytes(packed.device) // 2  # beside a strip there is its transpose
        for a, b in tile_ranges(
            vectors["codes"].shape[1], BLOCK * whole * computed.itemsize, budget
        ):
            columns_here = slice(a * BLOCK, min(b * BLOCK, columns))
            strip = products.decoded(
                packed, slice(None), slice(a, b), columns_here.stop - columns_here.start, computed
            )
            turned = transform.rotate(
                strip.T.contiguous(), transpose=True, in_place=True
            )  # (H_M C)ᵀ
            out[:, columns_here] = turned[:, start + rows[0] : start + rows[1]].T
        out = transform.rotate(out, transpose=True, after=vectors["input_scale"], in_place=True)
        scales = vectors["output_scale"][start + rows[0] : start + rows[1]].to(computed) * vectors[
            "scale"
        ].to(computed)
        return out.mul_(scales[:, None]).to(dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """Rotate x, multiply it by C, and rotate back: Ŵ itself is never made. In fp32, or fp64 where x is; bf16 as tiles are."""
        y = products.matmul(x, packed, transpose)
        return (
            super().matmul(x, packed, transpose) if y is None else y
        )  # the tiled product says what is wrong


def from_solution(solution: Solution, options: Options) -> PackedWeight:
    """Pack what the solver found, or what a file of another format holds.

    Raises:
        CheckpointError: tensors of other shapes or dtypes than ``options`` means.
    """
    metadata = metadata_of(options, [0, len(solution.output_scale)])
    shape = (len(solution.output_scale), len(solution.input_scale))
    tensors = {"codes": solution.codes, "residual": solution.residual, "input_scale": solution.input_scale,
               "output_scale": solution.output_scale, "scale": solution.scale}  # fmt: skip
    packed = PackedWeight(
        SPEC.name,
        QuIPSharpE8.format,
        shape,
        {n: t for n, t in tensors.items() if t is not None},
        metadata,
    )
    kernels.check_tensors(packed, tensors_of)
    return packed


def window(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Rows ``[start, stop)`` of a weight, on the same tensors."""
    check_rows(packed, (start, stop))
    metadata = dict(packed.metadata) | {
        "rows": [packed.metadata["rows"][0] + start, packed.metadata["rows"][1]]
    }
    return PackedWeight(
        packed.quantizer, packed.format, (stop - start, packed.shape[1]), packed.tensors, metadata
    )
