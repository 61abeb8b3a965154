"""QTIP behind the contract: packed tensors, tiles, products. The method is in reference.py.

Packed tensors; P(n) is n, or n rounded up to a multiple of 128 where Hadamard matrices are so
wide::

    trellis  int16 [⌈P(in) / 16⌉, ⌈P(out) / 16⌉, 16 bits]    walks, a tile of 16 × 16 weights each
    suh      fp16 [P(in)]                                    S_U, divided by the rescaling
    svh      fp16 [P(out)]                                   S_V
    scale    fp32 [1]                                        one unit of the code; only if "full"

    Ŵ = scale · diag(svh) H_out C H_inᵀ diag(suh), its first rows and columns    C: decoded walks

Metadata: ``bits``; ``states``, the bits of a state; ``code``, a name in :mod:`modulora_qtip.codes`.
``hadamard`` is ``"full"`` for matrices as wide as the dimension, or ``"128"`` for blocks of 128.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar
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
from modulora_qtip import SPEC, codes, packing, trellis
from modulora_qtip.reference import Options, Solution
from modulora_qtip.trellis import BLOCKS, TILE

KERNELS = "modulora_qtip.kernels"

ROUNDED_ROWS = 256
"""Rows of bf16 from which rotated inputs are rounded to bf16: fewer may be multiplied in fp32."""


class QTIP(Quantizer):
    """QTIP (Tseng, Sun, Hou, De Sa 2024, arXiv 2406.11235)."""

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
                "qtip: expected a calibration, the second moment of the layer's inputs, got none "
                f"for a weight of shape {list(weight.shape)}: give text to calibrate with"
            )
        # an fp64 weight would pack to other bytes than the same values in fp32
        weight = weight.to(torch.float32) if weight.dtype == torch.float64 else weight
        with kernels.without_autocast(weight.device):
            solution = packing.solve(weight, calibration.hessian, self.options)
        return packed_of(solution, (weight.shape[0], weight.shape[1]), self.options)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse sides that the layout ``exl3`` can't hold. Raises ShapeError."""
        block = self.options.block or 1
        for size, side in zip(shape, ("out_features", "in_features"), strict=True):
            if size % block:
                raise ShapeError(
                    f"qtip: layout exl3: expected a multiple of {block} as {side}, got {size}; "
                    "leave the layer out with --exclude, or quantize without layout=exl3"
                )

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        metadata = metadata_of(self.options)
        return PackedLayout(SPEC.name, self.format, shape, tensors(shape, **metadata), metadata)

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        super().check_format(packed)
        kernels.check_layout(packed, tensors)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """The product in the rotated basis, without Ŵ; in fp32, or in fp64 for fp64.

        x Ŵᵀ = (((x ⊙ suh) H_in) Cᵀ) H_outᵀ ⊙ svh, and x Ŵ = (((x ⊙ svh) H_out) C) H_inᵀ ⊙ suh.
        """
        kernels.check_tensors(packed, tensors)
        given, wanted = packed.shape if transpose else packed.shape[::-1]
        if x.dim() == 0 or x.shape[-1] != given:
            return super().matmul(x, packed, transpose)  # refuses it
        module = kernels.for_device(KERNELS, packed.device)
        if module is not None:
            y: Tensor | None = module.product_of_one(x, packed, transpose)
            if y is not None:
                return y
        block = BLOCKS[packed.metadata["hadamard"]]
        inputs = packed.tensors["suh"], None
        outputs = packed.tensors["svh"], packed.tensors.get("scale")
        before, after = (outputs, inputs) if transpose else (inputs, outputs)
        many = x.numel() > ROUNDED_ROWS * x.shape[-1]
        rounded = compute_dtype(x.dtype, x.device) if many and x.dtype == torch.bfloat16 else None
        turned = rotate(_padded(x, len(before[0])), *before, dtype=rounded, block=block)
        z = _product(turned, _codes(packed), transpose, x.dtype)[..., : len(after[0])]
        result = x.dtype if x.dtype == torch.bfloat16 else None
        y = rotate(z, *after, after=True, transpose=True, in_place=True, dtype=result, block=block)
        return y[..., :wanted].to(x.dtype)

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
        suh, svh = packed.tensors["suh"], packed.tensors["svh"][rows[0] : rows[1]]
        block = BLOCKS[packed.metadata["hadamard"]]
        C, whole, columns = _codes(packed), len(packed.tensors["svh"]), len(suh)
        out = torch.empty(rows[1] - rows[0], columns, dtype=computed, device=packed.device)
        if out.numel() == 0:
            return out[:, : packed.shape[1]].to(dtype)
        budget = tile_bytes(packed.device) // 2  # a strip and its transpose
        for a, b in tile_ranges(-(-columns // TILE), TILE * whole * computed.itemsize, budget):
            stop = min(b * TILE, columns)
            strip = _strip(C, a, b)
            values = _tile(strip, 0, strip.shape[0], computed)[:whole, : stop - a * TILE]
            turned = rotate(  # (H_out C)ᵀ
                values.T.contiguous(), transpose=True, in_place=True, block=block
            )
            out[:, a * TILE : stop] = turned[:, rows[0] : rows[1]].T
        out = rotate(out, suh, after=True, transpose=True, in_place=True, block=block)
        scales = svh.to(computed)
        if "scale" in packed.tensors:
            scales = scales * packed.tensors["scale"].to(computed)
        return out[:, : packed.shape[1]].mul_(scales[:, None]).to(dtype)

    def rescaled(
        self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor
    ) -> PackedWeight:
        """The same walks, with the scales multiplied in: exact but for rounding to fp16."""
        kernels.check_tensors(packed, tensors)
        stored = dict(packed.tensors)
        unit = stored.get("scale")
        for name, factor in (("suh", input_scale), ("svh", output_scale)):
            more = len(stored[name]) - len(factor)
            vector = stored[name].to(torch.float32) * F.pad(factor.float(), (0, more), value=1.0)
            if unit is not None:
                mean = vector.abs().mean()  # keeps fp16 far from its ends
                mean = mean.clamp(min=torch.finfo(torch.float32).tiny)
                vector, unit = vector / mean, unit * mean
            stored[name] = vector.to(torch.float16)
        if unit is not None:
            stored["scale"] = unit
        return PackedWeight(packed.quantizer, packed.format, packed.shape, stored, packed.metadata)


def tensors(
    shape: tuple[int, int], bits: int, states: int, code: str, hadamard: str
) -> dict[str, TensorLayout]:
    """The packed tensors of a weight of this shape, by name.

    Raises:
        TypeError, ValueError: metadata that this plugin does not write.
    """
    if type(bits) is not int or type(states) is not int:  # 2.0 and True equal cached keys
        raise TypeError(f"bits and states: expected whole numbers, got {bits!r} and {states!r}")
    return _tensors(shape, bits, states, code, hadamard)


@cache
def _tensors(
    shape: tuple[int, int], bits: int, states: int, code: str, hadamard: str
) -> dict[str, TensorLayout]:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: expected 1 to 8, got {bits}")
    if not bits <= states <= trellis.LARGEST_STATE:
        raise ValueError(f"states: expected {bits} to {trellis.LARGEST_STATE}, got {states}")
    if code not in codes.CODES:
        raise ValueError(f"code: expected one of {', '.join(codes.CODES)}, got {code!r}")
    if hadamard not in BLOCKS:
        raise ValueError(f"hadamard: expected one of {', '.join(BLOCKS)}, got {hadamard!r}")
    block = BLOCKS[hadamard] or 1
    M, N = (-(-n // block) * block for n in shape)
    tiles = (-(-N // TILE), -(-M // TILE), TILE * bits)
    found = {
        "trellis": TensorLayout("int16", tiles),
        "suh": TensorLayout("float16", (N,)),
        "svh": TensorLayout("float16", (M,)),
    }
    return found | ({"scale": TensorLayout("float32", (1,))} if hadamard == "full" else {})


def metadata_of(options: Options) -> dict[str, Any]:
    hadamard = "full" if options.block is None else str(options.block)
    return {
        "bits": options.bits, "states": options.states, "code": options.code, "hadamard": hadamard,
    }  # fmt: skip


def packed_of(solution: Solution, shape: tuple[int, int], options: Options) -> PackedWeight:
    """Pack a solution of the solver.

    Raises:
        CheckpointError: tensors that do not fit ``options``.
    """
    names = ("trellis", "suh", "svh") + (("scale",) if options.block is None else ())
    found = {name: getattr(solution, name) for name in names}
    packed = PackedWeight(SPEC.name, QTIP.format, shape, found, metadata_of(options))
    kernels.check_tensors(packed, tensors)
    return packed


# --- C, the walks alone ----------------------------------------------------------------------


_CODES: WeakKeyDictionary[PackedWeight, PackedWeight] = WeakKeyDictionary()
"""C of each weight."""


def _codes(packed: PackedWeight) -> PackedWeight:
    """C as a weight of its own, of whole tiles, cached beside ``packed``."""
    walks = packed.tensors["trellis"]
    C = _CODES.get(packed)
    if C is None or C.tensors["trellis"] is not walks:
        C = _of_walks(walks, packed)
        _CODES[packed] = C
    return C


def _of_walks(walks: Tensor, like: PackedWeight) -> PackedWeight:
    shape = (TILE * walks.shape[1], TILE * walks.shape[0])
    return PackedWeight(SPEC.name, like.format, shape, {"trellis": walks}, like.metadata)


def _strip(C: PackedWeight, a: int, b: int) -> PackedWeight:
    """Columns of tiles ``[a, b)`` of C."""
    return _of_walks(C.tensors["trellis"][a:b], C)


def _tile(C: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[start, stop)`` of C, ``[stop - start, in]``."""
    module = kernels.for_device(KERNELS, C.device)
    if module is not None:
        tile: Tensor = module.tile(C, (start, stop), dtype)
        return tile
    first, last = start // TILE, -(-stop // TILE)
    facts = C.metadata["bits"], C.metadata["states"], C.metadata["code"]
    dense = trellis.decode(C.tensors["trellis"][:, first:last], *facts)
    return dense[start - first * TILE : stop - first * TILE].to(dtype)


def _padded(x: Tensor, features: int) -> Tensor:
    return x if x.shape[-1] == features else F.pad(x.detach(), (0, features - x.shape[-1]))


def _product(x: Tensor, C: PackedWeight, transpose: bool, dtype: torch.dtype) -> Tensor:
    """``x Cᵀ``, or ``x C``, of rotated inputs, for a layer whose inputs are of ``dtype``."""
    x = _padded(x, C.shape[0 if transpose else 1])
    module = kernels.for_device(KERNELS, C.device)
    y: Tensor | None = None if module is None else module.multiply(x, C, transpose, dtype)
    if y is not None:
        return y
    if dtype == torch.bfloat16:  # as coarse as the inputs, and faster
        x = x.to(compute_dtype(dtype, x.device))
    return tiled_matmul(x, lambda start, stop, of: _tile(C, start, stop, of), C.shape, transpose)
