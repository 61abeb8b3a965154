"""QuIP# behind the contract: packed tensors, tiles, products. The method is in reference.py.

Packed tensors; ``whole`` is ``out``, except for a window, and a block is eight weights of a row::

    codes         int16 [whole, blocks]              E8P12 codes, the bits of unsigned numbers
    residual      uint8 or int16 [whole, blocks]     E8₁ at 3 bits, E8P12 again at 4
    input_scale   fp16 [in]                          S_U, divided by the rescaling
    output_scale  fp16 [whole]                       S_V
    scale         fp32 [1]                           one unit of the codebook

    Ŵ = scale · diag(output_scale) H_whole C H_inᵀ diag(input_scale)        C: the decoded codes

Metadata: ``bits``; ``rows``, ``[start, whole]``. A window is the rows from ``start`` on of a larger
weight, as in checkpoints that hold q, k and v as one matrix. Rotations mix all rows of the larger
weight, so each of its windows carries all of its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.dense_products import compute_dtype
from modulora_core.errors import OptionError, ShapeError
from modulora_core.kernels.rotation import rotate
from modulora_core.spec import (
    Calibration,
    PackedLayout,
    PackedWeight,
    Quantizer,
    TensorLayout,
    check_rows,
)
from modulora_core.tiles import tile_bytes, tile_ranges, tiled_matmul
from modulora_quip_sharp_e8 import SPEC, codebooks, packing
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.reference import Options, Solution

KERNELS = "modulora_quip_sharp_e8.kernels"

ROUNDED_ROWS = 256
"""Rows of bf16 from which rotated inputs are rounded to bf16: fewer may be multiplied in fp32."""


class QuIPSharpE8(Quantizer):
    """QuIP# with the E8P12 codebook (Tseng et al. 2024, arXiv 2402.04396)."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``: products with the calibrated inputs stay close.

        Raises:
            OptionError: there is no calibration.
            ShapeError: its H is not ``[in, in]``.
            WeightError: NaN or Inf in the weight or in H, or an H that is no second moment.
        """
        if calibration is None:
            raise OptionError(
                "quip-sharp-e8: expected a calibration, the second moment of the layer's inputs, "
                f"got none for a weight of shape {list(weight.shape)}: give text to calibrate with"
            )
        # an fp64 weight would pack to other bytes than the same values in fp32
        weight = weight.to(torch.float32) if weight.dtype == torch.float64 else weight
        with kernels.without_autocast(weight.device):
            solution = packing.solve(weight, calibration.hessian, self.options)
        return packed_of(solution, self.options)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        metadata = {"bits": self.options.bits, "rows": [0, shape[0]]}
        return PackedLayout(SPEC.name, self.format, shape, tensors(shape, **metadata), metadata)

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        super().check_format(packed)
        kernels.check_layout(packed, tensors)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """The product in the rotated basis, without Ŵ; in fp32, or in fp64 for fp64.

        x Ŵᵀ = (((x ⊙ S_U) H_in) Cᵀ) H_wholeᵀ ⊙ S_V, and x Ŵ = (((x ⊙ S_V) H_whole) C) H_inᵀ ⊙ S_U.
        """
        kernels.check_tensors(packed, tensors)
        out_features, in_features = packed.shape
        if x.dim() == 0 or x.shape[-1] != (out_features if transpose else in_features):
            return super().matmul(x, packed, transpose)  # refuses it
        start, whole = packed.metadata["rows"]
        if transpose:
            if whole != out_features:
                x = F.pad(x.detach(), (start, whole - start - out_features))
            return _whole_product(x, packed, transpose)
        y = _whole_product(x, packed, transpose)
        return y if whole == out_features else y[..., start : start + out_features]

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Rows of Ŵ in the original basis; in fp64 computed in fp64.

        Every row of Ŵ needs all of C. A strip of its columns at a time is decoded and rotated, and
        only ``rows`` are kept. So one row costs as much as all, and products never ask for it.
        """
        check_rows(packed, rows)
        kernels.check_tensors(packed, tensors)
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        C, (start, whole) = _codes(packed), packed.metadata["rows"]
        kept = slice(start + rows[0], start + rows[1])
        out = torch.empty(rows[1] - rows[0], C.shape[1], dtype=computed, device=packed.device)
        if out.numel() == 0:
            return out.to(dtype)
        budget = tile_bytes(packed.device) // 2  # a strip and its transpose
        blocks = C.tensors["codes"].shape[1]
        for a, b in tile_ranges(blocks, BLOCK * whole * computed.itemsize, budget):
            strip = _strip(C, a, b)
            columns = slice(a * BLOCK, a * BLOCK + strip.shape[1])
            turned = rotate(  # (H_whole C)ᵀ
                _tile(strip, 0, whole, computed).T.contiguous(), transpose=True, in_place=True
            )
            out[:, columns] = turned[:, kept].T
        S_U, S_V = packed.tensors["input_scale"], packed.tensors["output_scale"][kept]
        out = rotate(out, S_U, after=True, transpose=True, in_place=True)
        scales = S_V.to(computed) * packed.tensors["scale"].to(computed)
        return out.mul_(scales[:, None]).to(dtype)

    def rescaled(
        self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor
    ) -> PackedWeight:
        """The same codes, with the scales multiplied in: exact but for rounding to fp16."""
        kernels.check_tensors(packed, tensors)
        stored = dict(packed.tensors)
        if packed.shape[0] != len(stored["output_scale"]):
            raise ShapeError(
                f"quip-sharp-e8: expected a whole weight to rescale, got {packed.shape[0]} of its "
                f"{len(stored['output_scale'])} rows"
            )
        unit = stored["scale"]
        for name, factor in (("input_scale", input_scale), ("output_scale", output_scale)):
            vector = stored[name].to(torch.float32) * factor.to(unit)
            mean = vector.abs().mean()  # keeps fp16 far from its ends
            mean = mean.clamp(min=torch.finfo(torch.float32).tiny)
            stored[name], unit = (vector / mean).to(torch.float16), unit * mean
        stored["scale"] = unit
        return PackedWeight(packed.quantizer, packed.format, packed.shape, stored, packed.metadata)


def tensors(shape: tuple[int, int], bits: int, rows: Sequence[int]) -> dict[str, TensorLayout]:
    """The packed tensors of a weight of this shape, by name.

    Raises:
        TypeError, ValueError: metadata that this plugin does not write.
    """
    if any(type(number) is not int for number in (bits, *rows)):  # 2.0 and True equal cached keys
        raise TypeError(f"bits and rows: expected whole numbers, got {bits!r} and {rows!r}")
    return _tensors(shape, bits, *rows)


@cache
def _tensors(shape: tuple[int, int], bits: int, start: int, whole: int) -> dict[str, TensorLayout]:
    if bits not in codebooks.OPT_SCALE:
        raise ValueError(f"bits: expected one of {sorted(codebooks.OPT_SCALE)}, got {bits}")
    if not 0 <= start <= start + shape[0] <= whole:
        raise ValueError(
            f"rows: expected [start, whole] around {shape[0]} rows, got [{start}, {whole}]"
        )
    blocks = (whole, -(-shape[1] // BLOCK))
    residual = {3: "uint8", 4: "int16"}
    return {
        "codes": TensorLayout("int16", blocks),
        "input_scale": TensorLayout("float16", (shape[1],)),
        "output_scale": TensorLayout("float16", (whole,)),
        "scale": TensorLayout("float32", (1,)),
        **({"residual": TensorLayout(residual[bits], blocks)} if bits in residual else {}),
    }


def packed_of(solution: Solution, options: Options) -> PackedWeight:
    """Pack a solution of the solver, or of a foreign file.

    Raises:
        CheckpointError: tensors that do not fit ``options``.
    """
    shape = (len(solution.output_scale), len(solution.input_scale))
    names = ("codes", "residual", "input_scale", "output_scale", "scale")
    found = {name: getattr(solution, name) for name in names}
    packed = PackedWeight(
        SPEC.name,
        QuIPSharpE8.format,
        shape,
        {name: tensor for name, tensor in found.items() if tensor is not None},
        {"bits": options.bits, "rows": [0, shape[0]]},
    )
    kernels.check_tensors(packed, tensors)
    return packed


def window(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Rows ``[start, stop)`` of a weight, on the same tensors."""
    check_rows(packed, (start, stop))
    first, whole = packed.metadata["rows"]
    metadata = dict(packed.metadata) | {"rows": [first + start, whole]}
    shape = (stop - start, packed.shape[1])
    return PackedWeight(packed.quantizer, packed.format, shape, packed.tensors, metadata)


# --- C, the codes alone ----------------------------------------------------------------------


_CODES: WeakKeyDictionary[PackedWeight, PackedWeight] = WeakKeyDictionary()
"""C of each weight."""


def _codes(packed: PackedWeight) -> PackedWeight:
    """C as a weight of its own, ``[whole, in]``, cached beside ``packed``."""
    held = {name: t for name, t in packed.tensors.items() if name in ("codes", "residual")}
    C = _CODES.get(packed)
    if C is None or any(C.tensors[name] is not tensor for name, tensor in held.items()):
        shape = (packed.metadata["rows"][1], packed.shape[1])
        C = PackedWeight(SPEC.name, packed.format, shape, held, {"bits": packed.metadata["bits"]})
        _CODES[packed] = C
    return C


def _strip(C: PackedWeight, a: int, b: int) -> PackedWeight:
    """Columns of blocks ``[a, b)`` of C."""
    held = {name: tensor[:, a:b].contiguous() for name, tensor in C.tensors.items()}
    shape = (C.shape[0], min(b * BLOCK, C.shape[1]) - a * BLOCK)
    return PackedWeight(C.quantizer, C.format, shape, held, C.metadata)


def _tile(C: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[start, stop)`` of C, ``[stop - start, in]``."""
    module = kernels.for_device(KERNELS, C.device)
    if module is not None:
        tile: Tensor = module.tile(C, (start, stop), dtype)
        return tile
    held = {name: tensor[start:stop] for name, tensor in C.tensors.items()}
    dense = codebooks.decode(held["codes"], held.get("residual"), C.metadata["bits"])
    return dense[:, : C.shape[1]].to(dtype)


def _whole_product(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ`` if ``transpose``, for all rows of C; in ``x``'s dtype."""
    module = kernels.for_device(KERNELS, packed.device)
    if module is not None and not transpose:
        y: Tensor | None = module.product_of_one(x, packed)
        if y is not None:
            return y
    inputs = packed.tensors["input_scale"], None
    outputs = packed.tensors["output_scale"], packed.tensors["scale"]
    before, after = (outputs, inputs) if transpose else (inputs, outputs)
    many = x.numel() > ROUNDED_ROWS * x.shape[-1]
    rounded = compute_dtype(x.dtype, x.device) if many and x.dtype == torch.bfloat16 else None
    turned = rotate(x, *before, dtype=rounded)
    z = _product(turned, _codes(packed), transpose, x.dtype)
    result = x.dtype if x.dtype == torch.bfloat16 else None
    return rotate(z, *after, after=True, transpose=True, in_place=True, dtype=result).to(x.dtype)


def _product(x: Tensor, C: PackedWeight, transpose: bool, dtype: torch.dtype) -> Tensor:
    """``x Cᵀ``, or ``x C``, of rotated inputs, for a layer whose inputs are of ``dtype``."""
    module = kernels.for_device(KERNELS, C.device)
    y: Tensor | None = None if module is None else module.multiply(x, C, transpose, dtype)
    if y is not None:
        return y
    if dtype == torch.bfloat16:  # as coarse as the inputs, and faster
        x = x.to(compute_dtype(dtype, x.device))
    return tiled_matmul(x, lambda start, stop, of: _tile(C, start, stop, of), C.shape, transpose)
