"""Products with QuIP#'s weights, in the rotated basis, and which code makes them.

    x Ŵᵀ = (((x ⊙ S_U) H_in) Cᵀ) H_outᵀ ⊙ S_V
    x Ŵ  = (((x ⊙ S_V) H_out) C) H_inᵀ ⊙ S_U

Ŵ itself is never made. C is multiplied by numba's kernels on the CPU, by Triton's on a GPU, and in plain torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.devices.dense_products import compute_dtype
from modulora_core.spec import PackedWeight
from modulora_core.tiles import tiled_matmul
from modulora_quip_sharp_e8 import codebooks, transform
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.hadamard import LARGEST_ORDER
from modulora_quip_sharp_e8.packed_layout import tensors_of, whole_shape

FEW_ROWS = 64
"""Up to so many rows of x the fused kernel is faster than a product over decoded tiles (README, Speed)."""


def matmul(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, in ``x``'s dtype; None where ``x`` doesn't fit.

    Computed in fp32, or fp64 where x is; bf16 is multiplied as tiles are.
    """
    y = _by_kernels(x, packed, transpose)
    return _in_torch(x, packed, transpose) if y is None else y


def _in_torch(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    """With operations of torch, or of a GPU, between rotations and product: for any dtype and device."""
    kernels.check_tensors(packed, tensors_of)
    whole, columns = whole_shape(packed)
    start, stop = packed.metadata["rows"][0], packed.metadata["rows"][0] + packed.shape[0]
    given = packed.shape[0] if transpose else columns
    if x.dim() == 0 or x.shape[-1] != given:
        return None
    input_scale = packed.tensors["input_scale"]
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    output_scale = packed.tensors["output_scale"] * packed.tensors["scale"].to(computed)
    weight = partial(operands, packed, slice(None), slice(None))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if transpose:
            y = F.pad(x.detach(), (start, whole - stop)) if whole != given else x.detach()
            z = by_codes(transform.rotate(y, before=output_scale), packed, weight, True, x.dtype)
            result = transform.rotate(z, transpose=True, after=input_scale, in_place=True)
        else:
            y = transform.rotate(x.detach(), before=input_scale)
            z = by_codes(y, packed, weight, False, x.dtype)
            turned = transform.rotate(z, transpose=True, after=output_scale, in_place=True)
            result = turned[..., start:stop]
        return result.to(x.dtype)


def _by_kernels(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    """By the CPU's kernels, rotations and all; None where that isn't what is wanted, or can't be.

    What they read of a weight is looked up, and torch does next to nothing between them: behind a product, which leaves nothing of torch's
    code in the caches, its small operations take many times as long as alone (docs/performance-findings.md).
    """
    one: Any = kernels.load("modulora_quip_sharp_e8.cpu_one_row", packed.device)
    if one is None or _gpu(packed.device) is not None:
        return None
    rows = _rows(x, packed.shape[0 if transpose else 1])
    if rows is None:
        return None
    weight = kernels.operands(packed, _turned_back if transpose else _turned)
    if max(weight[7], weight[9]) > LARGEST_ORDER:
        return None
    start, (whole, columns) = packed.metadata["rows"][0], whole_shape(packed)
    is_window = whole != packed.shape[0]
    if transpose and is_window:
        rows = F.pad(rows, (start, whole - start - packed.shape[0]))
    if not transpose and rows.numel() == columns:
        y = kernels.product_of_one(one.forward_one, weight, rows, whole)
    else:
        y = _between(rows, packed, weight, transpose, x.dtype)
    if not transpose and is_window:
        y = y[..., start : start + packed.shape[0]]
    return kernels.like_input(y, x)


def _rows(x: Tensor, features: int) -> Tensor | None:
    """``x`` as kernels rotate it, contiguous ``[..., features]``: several rows of bf16 as they are, else fp32. None if it doesn't fit."""
    if (
        x.dtype is torch.bfloat16
        and x.is_cpu
        and x.shape[-1:] == (features,)
        and x.numel() > features
    ):
        return x.detach().contiguous()
    return kernels.fp32_input(x, features)


def _between(
    x: Tensor, packed: PackedWeight, weight: tuple[Any, ...], transpose: bool, dtype: torch.dtype
) -> Tensor:
    """``x`` rotated, multiplied by C, and rotated back, in its dtype, for inputs that were of ``dtype``.

    ``weight`` is as :func:`_with_matrices` gives it, in arrays.
    """
    codes, residual, bits, input_scale, output_scale, unit, first, K_first, second, K_second = (
        weight
    )
    before, after = (input_scale, np.float32(1)), (output_scale, unit[0])
    if transpose:
        before, after = after, before
    rows = kernels.rows_of(x)
    # fewer rows of bf16 may be multiplied in fp32, or to sums in fp32, and aren't rounded before and behind
    by_tiles = len(rows) > kernels.MOST_ROWS_BY_AMX
    turned = torch.empty(
        x.shape, dtype=compute_dtype(x.dtype, x.device) if by_tiles else torch.float32
    )
    transform.turn(rows, *before, first, K_first, False, kernels.rows_of(turned))
    z = by_codes(turned, packed, lambda: (codes, residual, bits), transpose, dtype).contiguous()
    y = z if z.dtype is x.dtype else torch.empty(z.shape, dtype=x.dtype)
    transform.turn(kernels.rows_of(z), *after, second, K_second, True, kernels.rows_of(y))
    return y


def _turned(packed: PackedWeight) -> tuple[Any, ...]:
    """A weight as :func:`modulora_quip_sharp_e8.cpu_one_row.forward_one` takes it."""
    return _with_matrices(packed, back=False)


def _turned_back(packed: PackedWeight) -> tuple[Any, ...]:
    """The same for the transposed product, whose first rotation is that of the outputs."""
    return _with_matrices(packed, back=True)


def _with_matrices(packed: PackedWeight, *, back: bool) -> tuple[Any, ...]:
    """What kernels read of a weight, with the matrices of the rotation before a product and of the one behind it."""
    kernels.check_tensors(packed, tensors_of)
    whole, columns = whole_shape(packed)
    first, second = (whole, columns) if back else (columns, whole)
    tensors, orders = packed.tensors, (transform.order(first), transform.order(second))
    small = max(orders) <= LARGEST_ORDER  # else the matrix isn't read, and is large
    matrices = [
        transform.laid_out(n, behind, torch.float32) if small else torch.empty(0)
        for n, behind in ((first, False), (second, True))
    ]
    scales = tensors["input_scale"], tensors["output_scale"]
    codes, residual, bits = operands(packed, slice(None), slice(None))
    return (
        codes,
        residual,
        bits,
        *scales,
        tensors["scale"],
        matrices[0],
        orders[0],
        matrices[1],
        orders[1],
    )


def by_codes(
    x: Tensor,
    packed: PackedWeight,
    weight: Callable[[], tuple[Any, Any, int]],
    transpose: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``x Cᵀ``, or ``x C`` when ``transpose``, of inputs that were of ``dtype`` before they were rotated.

    ``weight`` gives codes, residual and bits, as tensors or, on the CPU, arrays.
    """
    whole, columns = whole_shape(packed)
    gpu = _gpu(packed.device)
    if gpu is not None and dtype != torch.float64:
        y: Tensor = gpu.product(x, dtype, *weight(), columns, transpose)
        return y
    cpu = _kernels(packed.device)
    few: Tensor | None = None
    if cpu is not None:
        few = cpu.rows.product(x, (whole, columns), weight, FEW_ROWS, transpose, dtype)
    if few is not None:
        return few

    def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if cpu is None or gpu is not None:
            return decoded(packed, slice(start, stop), slice(None), columns, dtype)
        dense: Tensor = cpu.rows.tile(weight(), (start, stop), columns, dtype)
        return dense

    if dtype == torch.bfloat16:
        # rotated, inputs are in fp32; as coarse as they were, a CPU may multiply them faster
        x = x.to(compute_dtype(dtype, x.device))
    return tiled_matmul(x, tile, (whole, columns), transpose)


def decoded(
    packed: PackedWeight,
    rows: slice,
    blocks: slice,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A part of C, ``[rows, columns]``: the first columns of these blocks."""
    gpu = _gpu(packed.device)
    if gpu is not None:
        codes, residual, bits = operands(packed, slice(None), slice(None))
        start, stop, _ = rows.indices(len(codes))
        first = BLOCK * (blocks.start or 0)
        part: Tensor = gpu.dequantize(
            codes, residual, bits, (start, stop), (first, first + columns), torch.float32
        )
        return part.to(dtype)
    codes, residual, bits = operands(packed, rows, blocks)
    cpu = _kernels(packed.device)
    if cpu is None:
        return codebooks.decode(codes, None if bits == 2 else residual, bits)[:, :columns].to(dtype)
    dense: Tensor = cpu.rows.tile((codes, residual, bits), (0, len(codes)), columns, dtype)
    return dense


def operands(packed: PackedWeight, rows: slice, blocks: slice) -> tuple[Tensor, Tensor, int]:
    """Codes, residual (codes once more where there is none) and bits, as the kernels take them."""
    codes = packed.tensors["codes"][rows, blocks].contiguous()
    bits = packed.metadata["bits"]
    return (
        codes,
        codes if bits == 2 else packed.tensors["residual"][rows, blocks].contiguous(),
        bits,
    )


def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they can't run, and then plain torch does."""
    return kernels.load("modulora_quip_sharp_e8.cpu", device)


def _gpu(device: torch.device) -> Any:
    """Those for GPUs, likewise."""
    return kernels.load_triton("modulora_quip_sharp_e8.gpu", device)
