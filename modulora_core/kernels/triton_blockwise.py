"""Activations to a byte each and back on a GPU, in Triton, as :mod:`modulora_core.blockwise` has it.

    moves      an activation in its own dtype, its code of a byte, and four bytes a block, once each way
    computes   some eight operations for each activation
    floor      the bandwidth of memory: 3 bytes an activation of bf16 each way, 5 of fp32

Values are those of plain torch on the CPU, bit for bit. Plain torch itself, on a GPU, goes over the activations in fp32 once for each
operation.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from modulora_core.kernels.triton_blocks import block, rounded
from modulora_core.kernels.triton_launch import launch

_ROWS = 16  # of a program, one block wide
# so large a number has no bits behind the point: adding it rounds to a whole number, halves to even
_INTEGER = tl.constexpr(1.5 * 2.0**23)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, codes, scales, n, d, BLOCK: tl.constexpr, ROWS: tl.constexpr, SMALLEST: tl.constexpr
) -> None:
    row, number = tl.program_id(0) * ROWS, tl.program_id(1)
    at, inside = block(row, number * BLOCK, n, d, ROWS, BLOCK)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as whole numbers NaN is the largest
    bits = tl.max(magnitudes, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    place, exists = block(row, number, n, tl.cdiv(d, BLOCK), ROWS, 1)
    tl.store(scales + place, tl.div_rn(largest, 127.0)[:, None], mask=exists)
    reciprocal = tl.where(largest >= SMALLEST, tl.div_rn(127.0, largest), 0.0)
    q = (values * reciprocal[:, None] + _INTEGER) - _INTEGER
    # what isn't finite has no code, and its scale says so
    tl.store(codes + at, tl.where(bits[:, None] < _INFINITY, q, 0.0).to(tl.int8), mask=inside)


@triton.jit
def _dequantize(codes, scales, x, n, d, BLOCK: tl.constexpr, ROWS: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row, number = tl.program_id(0) * ROWS, tl.program_id(1)
    at, inside = block(row, number * BLOCK, n, d, ROWS, BLOCK)
    place, exists = block(row, number, n, tl.cdiv(d, BLOCK), ROWS, 1)
    scale = tl.load(scales + place, mask=exists, other=0.0)
    values = tl.load(codes + at, mask=inside, other=0).to(tl.float32) * scale
    tl.store(x + at, rounded(values, x.dtype.element_ty), mask=inside)


def quantize(x: Tensor, size: int, smallest: float, codes: Tensor, scales: Tensor) -> None:
    """``codes`` int8 ``[n, d]`` and ``scales`` fp32 ``[n, blocks]`` of ``x``, in blocks of ``size``, a power of two; those without a
    magnitude of ``smallest`` are zeros.
    """
    _launch(_quantize, (x, codes, scales), codes, {"BLOCK": size, "ROWS": _ROWS, "SMALLEST": smallest})


def dequantize(codes: Tensor, scales: Tensor, size: int, x: Tensor) -> None:
    """All of ``x``, ``[n, d]``, of what :func:`quantize` made."""
    _launch(_dequantize, (codes, scales, x), codes, {"BLOCK": size, "ROWS": _ROWS})


def _launch(kernel: Any, tensors: tuple[Tensor, ...], codes: Tensor, constants: dict[str, Any]) -> None:
    if codes.numel():
        n, d = codes.shape
        grid = (triton.cdiv(n, _ROWS), triton.cdiv(d, constants["BLOCK"]))
        launch(kernel, lambda _: grid, (*tensors, n, d), constants)
