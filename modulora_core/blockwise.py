"""Activations in a byte each for the time until the backward: block-wise quantization (Dettmers et al. 2022, arXiv 2110.02861), linear.

    s = max |x| / 127 over each block of a row          q = round(x / s), a signed byte          x̂ = s q

What a step keeps of its activations may be rounded so with little harm to its gradients (Chen et al. 2021, arXiv 2104.14129, go further
down). A block is short because a few channels of a transformer are many times as large as others: their block alone is rounded by
their measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.dense_products import is_plain
from modulora_core.tiles import tile_bytes, tile_ranges

BLOCK = 128
"""Values with one scale, of 4 bytes: 8.25 bits a value."""

_SMALLEST = 2.0**-119
"""Blocks of smaller values become zeros: 127 divided by these isn't finite in float32."""


@dataclass(frozen=True, slots=True)
class Blockwise:
    """A tensor in a byte a value.

    Attributes:
        codes: q, signed bytes in the tensor's shape ``[..., d]``.
        scales: s, ``[rows, blocks of a row]``, in float32 or wider.
        dtype: of the tensor.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def quantize(cls, x: Tensor) -> Self:
        """``x``: ``[..., d]`` of at least one dimension, any float dtype and device. A block with a NaN or an infinity becomes NaN."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
        scales = torch.empty(len(rows), -(-rows.shape[1] // BLOCK), dtype=wide, device=x.device)
        if (gpu := _gpu(x)) is not None:
            gpu.quantize(rows, BLOCK, _SMALLEST, codes, scales)
        elif (cpu := _kernels(x)) is not None:
            kernels.launch(cpu.quantize, rows, BLOCK, _SMALLEST, codes, scales)
        else:
            _quantize(rows, codes, scales)
        return cls(codes.view(x.shape), scales, x.dtype)

    def dequantize(self) -> Tensor:
        """x̂, in the tensor's shape and dtype, rounded to it once."""
        x = torch.empty(self.codes.shape, dtype=self.dtype, device=self.codes.device)
        codes, rows = (t.view(-1, x.shape[-1]) for t in (self.codes, x))
        if (gpu := _gpu(x)) is not None:
            gpu.dequantize(codes, self.scales, BLOCK, rows)
        elif (cpu := _kernels(x)) is not None:
            kernels.launch(cpu.dequantize, codes, self.scales, BLOCK, rows)
        else:
            _dequantize(codes, self.scales, rows)
        return x


def _kernels(x: Tensor) -> Any:
    """The CPU's, where they know its dtype and it has memory; else None."""
    if x.dtype not in (torch.float32, torch.bfloat16) or not is_plain(x):
        return None
    return kernels.load("modulora_core.kernels.blockwise", x.device)


def _gpu(x: Tensor) -> Any:
    """Triton's, likewise."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not is_plain(x):
        return None
    return kernels.load_triton("modulora_core.kernels.triton_blockwise", x.device)


def _quantize(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """The reference, some rows at a time, because they are copied. ``x``: ``[n, d]``."""
    d = x.shape[1]
    for start, stop in tile_ranges(len(x), d * scales.element_size(), tile_bytes(x.device)):
        blocks = _in_blocks(x[start:stop].to(scales.dtype))
        largest = blocks.abs().amax(2)
        scales[start:stop] = largest / 127
        # a number over a tensor would be a product with the tensor's reciprocal, which is rounded too
        reciprocal = torch.where(largest >= _SMALLEST, torch.full_like(largest, 127) / largest, 0)
        q = (blocks * reciprocal[..., None]).round()
        # what isn't finite has no code, and its scale says so
        codes[start:stop] = q.nan_to_num_(0, 0, 0).view(stop - start, -1)[:, :d].to(torch.int8)


def _dequantize(codes: Tensor, scales: Tensor, x: Tensor) -> None:
    d = x.shape[1]
    for start, stop in tile_ranges(len(x), d * scales.element_size(), tile_bytes(x.device)):
        blocks = _in_blocks(codes[start:stop].to(scales.dtype)) * scales[start:stop, :, None]
        x[start:stop] = blocks.view(stop - start, -1)[:, :d]


def _in_blocks(rows: Tensor) -> Tensor:
    """``[n, blocks, BLOCK]`` of ``[n, d]``; zeros fill the last one."""
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).view(len(rows), -1, BLOCK)
