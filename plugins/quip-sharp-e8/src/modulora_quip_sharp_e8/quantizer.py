"""QuIP# behind the contract: packed tensors, products in the rotated basis, and which code runs where.

Packed tensors; ``whole`` is ``out`` but for a window, and a block is eight weights of a row::

    codes         int16 [whole, blocks]              E8P12 codes, the bits of unsigned numbers
    residual      uint8 or int16 [whole, blocks]     at 3 bits E8₁, at 4 bits E8P12 once more
    input_scale   fp16 [in]                          S_U, over the rescaling
    output_scale  fp16 [whole]                       S_V
    scale         fp32 [1]                           what one unit of the codebook is

    Ŵ = scale · diag(output_scale) H_whole C H_inᵀ diag(input_scale)        C: the decoded codes

Metadata: ``bits``; ``rows``, ``[start, whole]``: the weight is the rows from ``start`` on of a larger
one of so many rows, as in checkpoints that hold q, k and v as one matrix. Rotations mix all rows of the larger one,
so each of its parts carries all of its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.errors import OptionError, ShapeError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, Quantizer, TensorLayout, check_rows
from modulora_core.tiles import compute_dtype, tile_bytes, tile_ranges, tiled_matmul
from modulora_quip_sharp_e8 import SPEC, codebooks, solver, transform
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.hadamard import LARGEST_ORDER
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.reference import Solution

FEW_ROWS = 64
"""Up to so many rows of x the fused kernel is faster than a product over decoded tiles (README, Speed)."""


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
        metadata = _metadata(options, [0, shape[0]])
        return PackedLayout(SPEC.name, self.format, shape, _tensors(shape, **metadata), metadata)

    def rescaled(self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor) -> PackedWeight:
        """The same codes between scales that are multiplied by these: exact but for the rounding of scales to fp16."""
        kernels.check_tensors(packed, _tensors)
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

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Rows of Ŵ in the original basis; in fp64 computed in fp64.

        Every row of Ŵ needs all of C: a strip of its columns at a time is decoded, rotated back, and left but for ``rows``. So this
        costs as much for one row as for all, and products never ask for it.
        """
        check_rows(packed, rows)
        kernels.check_tensors(packed, _tensors)
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        start, (whole, columns) = packed.metadata["rows"][0], _whole(packed)
        out = torch.empty(rows[1] - rows[0], columns, dtype=computed, device=packed.device)
        if out.numel() == 0:
            return out.to(dtype)
        vectors = packed.tensors
        budget = tile_bytes(packed.device) // 2  # beside a strip there is its transpose
        for a, b in tile_ranges(vectors["codes"].shape[1], BLOCK * whole * computed.itemsize, budget):
            columns_here = slice(a * BLOCK, min(b * BLOCK, columns))
            strip = _decode(
                packed, slice(None), slice(a, b), columns_here.stop - columns_here.start, computed
            )
            turned = transform.rotate(strip.T.contiguous(), transpose=True, in_place=True)  # (H_M C)ᵀ
            out[:, columns_here] = turned[:, start + rows[0] : start + rows[1]].T
        out = transform.rotate(out, transpose=True, after=vectors["input_scale"], in_place=True)
        scales = vectors["output_scale"][start + rows[0] : start + rows[1]].to(computed) * vectors[
            "scale"
        ].to(computed)
        return out.mul_(scales[:, None]).to(dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """Rotate x, multiply it by C, and rotate back: Ŵ itself is never made. In fp32, or fp64 where x is; bf16 as tiles are."""
        if not transpose and (token := _token(x, packed)) is not None:
            return token
        kernels.check_tensors(packed, _tensors)
        whole, columns = _whole(packed)
        start, stop = packed.metadata["rows"][0], packed.metadata["rows"][0] + packed.shape[0]
        given = packed.shape[0] if transpose else columns
        if x.dim() == 0 or x.shape[-1] != given:  # the tiled product says what is wrong
            return super().matmul(x, packed, transpose)
        input_scale = packed.tensors["input_scale"]
        computed = torch.float64 if x.dtype == torch.float64 else torch.float32
        output_scale = packed.tensors["output_scale"] * packed.tensors["scale"].to(computed)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if transpose:
                y = F.pad(x.detach(), (start, whole - stop)) if whole != given else x.detach()
                y = transform.rotate(y, before=output_scale)
                z = _rotated_matmul(y, packed, True, x.dtype)
                result = transform.rotate(z, transpose=True, after=input_scale, in_place=True)
            else:
                z = _rotated_matmul(transform.rotate(x.detach(), before=input_scale), packed, False, x.dtype)
                result = transform.rotate(z, transpose=True, after=output_scale, in_place=True)[
                    ..., start:stop
                ]
            return result.to(x.dtype)


def from_solution(solution: Solution, options: Options) -> PackedWeight:
    """Pack what the solver found, or what a file of another format holds.

    Raises:
        CheckpointError: tensors of other shapes or dtypes than ``options`` means.
    """
    metadata = _metadata(options, [0, len(solution.output_scale)])
    shape = (len(solution.output_scale), len(solution.input_scale))
    tensors = {"codes": solution.codes, "residual": solution.residual, "input_scale": solution.input_scale,
               "output_scale": solution.output_scale, "scale": solution.scale}  # fmt: skip
    packed = PackedWeight(
        SPEC.name, QuIPSharpE8.format, shape, {n: t for n, t in tensors.items() if t is not None}, metadata
    )
    kernels.check_tensors(packed, _tensors)
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


def _metadata(options: Options, rows: list[int]) -> dict[str, Any]:
    return {"bits": options.bits, "rows": rows}


def _tensors(shape: tuple[int, int], bits: int, rows: Sequence[int]) -> dict[str, TensorLayout]:
    """What a weight of this shape is packed into. Raises ValueError or TypeError for metadata that can't be."""
    if any(
        type(number) is not int for number in (bits, *rows)
    ):  # 2.0 and True would pass for what was cached
        raise TypeError(f"bits and rows: expected whole numbers, got {bits!r} and {rows!r}")
    return _known_tensors(shape, bits, *rows)


@cache
def _known_tensors(shape: tuple[int, int], bits: int, start: int, whole: int) -> dict[str, TensorLayout]:
    if bits not in codebooks.OPT_SCALE:
        raise ValueError(f"bits: expected one of {', '.join(map(str, codebooks.OPT_SCALE))}, got {bits}")
    if not 0 <= start <= start + shape[0] <= whole:
        raise ValueError(f"rows: expected [start, whole] around {shape[0]} rows, got [{start}, {whole}]")
    blocks = (whole, -(-shape[1] // BLOCK))
    tensors = {
        "codes": TensorLayout("int16", blocks),
        "input_scale": TensorLayout("float16", (shape[1],)),
        "output_scale": TensorLayout("float16", (whole,)),
        "scale": TensorLayout("float32", (1,)),
    }
    if bits > 2:
        tensors["residual"] = TensorLayout("uint8" if bits == 3 else "int16", blocks)
    return tensors


def _whole(packed: PackedWeight) -> tuple[int, int]:
    """The shape of C: of the larger weight, where this one is a window."""
    return packed.metadata["rows"][1], packed.shape[1]


def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they can't run, and then plain torch does."""
    return kernels.load("modulora_quip_sharp_e8.cpu", device)


def _gpu(device: torch.device) -> Any:
    """Those for GPUs, likewise."""
    return kernels.load_triton("modulora_quip_sharp_e8.gpu", device)


def _operands(packed: PackedWeight, rows: slice, blocks: slice) -> tuple[Tensor, Tensor, int]:
    """Codes, residual (codes once more where there is none) and bits, as the kernels take them."""
    codes = packed.tensors["codes"][rows, blocks].contiguous()
    bits = packed.metadata["bits"]
    return codes, codes if bits == 2 else packed.tensors["residual"][rows, blocks].contiguous(), bits


def _decode(
    packed: PackedWeight, rows: slice, blocks: slice, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A part of C, ``[rows, columns]``: the first columns of these blocks."""
    gpu = _gpu(packed.device)
    if gpu is not None:
        codes, residual, bits = _operands(packed, slice(None), slice(None))
        start, stop, _ = rows.indices(len(codes))
        first = BLOCK * (blocks.start or 0)
        part: Tensor = gpu.dequantize(
            codes, residual, bits, (start, stop), (first, first + columns), torch.float32
        )
        return part.to(dtype)
    codes, residual, bits = _operands(packed, rows, blocks)
    cpu = _kernels(packed.device)
    if cpu is None:
        return codebooks.decode(codes, None if bits == 2 else residual, bits)[:, :columns].to(dtype)
    decoded: Tensor = cpu.rows.tile((codes, residual, bits), (0, len(codes)), columns, dtype)
    return decoded


def _token(x: Tensor, packed: PackedWeight) -> Tensor | None:
    """``x Ŵᵀ`` of a single row on the CPU, in one call of a kernel; None where that isn't what is wanted, or can't be."""
    one: Any = kernels.load("modulora_quip_sharp_e8.cpu_one_row", packed.device)
    row = None if one is None else kernels.few_rows(x, packed.shape[1], 1)  # [..., in]
    if row is None or _gpu(packed.device) is not None:
        return None
    weight = kernels.operands(packed, _rotated)
    if max(weight[7], weight[9]) > LARGEST_ORDER:
        return None
    y = kernels.product_of_one(one.forward_one, weight, row, len(weight[0]))
    if y.shape[-1] != packed.shape[0]:
        start = packed.metadata["rows"][0]
        y = y[..., start : start + packed.shape[0]]
    return kernels.like_input(y, x)


def _rotated(packed: PackedWeight) -> tuple[Any, ...]:
    """A weight as :func:`modulora_quip_sharp_e8.cpu_one_row.forward_one` takes it."""
    kernels.check_tensors(packed, _tensors)
    tensors = packed.tensors
    whole, columns = _whole(packed)
    K_in, K_out = transform.order(columns), transform.order(whole)
    small = max(K_in, K_out) <= LARGEST_ORDER  # else the matrix isn't read, and is large
    matrices = [
        transform.panels(K, turned, torch.float32) if small else torch.empty(0)
        for K, turned in ((K_in, False), (K_out, True))
    ]
    scales = tensors["input_scale"], tensors["output_scale"]
    codes, residual, bits = _operands(packed, slice(None), slice(None))
    return codes, residual, bits, *scales, tensors["scale"], matrices[0], K_in, matrices[1], K_out


def _rotated_matmul(x: Tensor, packed: PackedWeight, transpose: bool, dtype: torch.dtype) -> Tensor:
    """``x Cᵀ``, or ``x C`` when ``transpose``, of inputs that were of ``dtype`` before they were rotated."""
    whole, columns = _whole(packed)
    gpu = _gpu(packed.device)
    if gpu is not None and dtype != torch.float64:
        codes, residual, bits = _operands(packed, slice(None), slice(None))
        y: Tensor = gpu.product(x, dtype, codes, residual, bits, columns, transpose)
        return y
    cpu = _kernels(packed.device)
    few: Tensor | None = None
    if cpu is not None:
        weight = partial(_operands, packed, slice(None), slice(None))
        few = cpu.rows.product(x, (whole, columns), weight, FEW_ROWS, transpose, dtype)
    if few is not None:
        return few

    def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return _decode(packed, slice(start, stop), slice(None), columns, dtype)

    if dtype == torch.bfloat16:
        # rotated, inputs are in fp32; as coarse as they were, a CPU may multiply them faster
        x = x.to(compute_dtype(dtype, x.device))
    return tiled_matmul(x, tile, (whole, columns), transpose)
