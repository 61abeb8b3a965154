"""Activations in eight bits for the time until the backward: block-wise quantization (Dettmers et al. 2022, arXiv 2110.02861), linear.

    s = max |x| / 127 over each block of a row          q = round(x / s)  in int8          x̂ = s q

What a step keeps of its activations may be rounded so with little harm to its gradients (Chen et al. 2021, arXiv 2104.14129, go down to two
bits). A block is short because a few channels of a transformer are many times as large as others: their block alone is rounded by
their measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.tiles import tile_bytes, tile_ranges

BLOCK = 128
"""Values with one scale, of 4 bytes: 8.25 bits a value."""

_SMALLEST = 2.0**-119
"""Blocks of smaller values become zeros: 127 divided by these isn't finite in float32."""


@dataclass(frozen=True, slots=True)
class Blockwise:
    """A tensor in eight bits.

    Attributes:
        codes: q, int8 in the tensor's shape ``[..., d]``.
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
        cpu = kernels.load("modulora_core.kernels.blockwise", x.device) if _has_kernel(x) else None
        if cpu is not None:
            kernels.launch(cpu.quantize, rows, BLOCK, _SMALLEST, codes, scales)
        else:
            _quantize(rows, codes, scales)
        return cls(codes.view(x.shape), scales, x.dtype)

    def dequantize(self) -> Tensor:
        """x̂, in the tensor's shape and dtype, rounded to it once."""
        x = torch.empty(self.codes.shape, dtype=self.dtype, device=self.codes.device)
        codes, rows = (t.view(-1, x.shape[-1]) for t in (self.codes, x))
        cpu = kernels.load("modulora_core.kernels.blockwise", x.device) if _has_kernel(x) else None
        if cpu is not None:
            kernels.launch(cpu.dequantize, codes, self.scales, BLOCK, rows)
        else:
            _dequantize(codes, self.scales, rows)
        return x


def _has_kernel(x: Tensor) -> bool:
    """Whether the CPU's kernels know its dtype, and it has memory: what `modulora plan` rehearses with has none."""
    return x.dtype in (torch.float32, torch.bfloat16) and type(x) in (Tensor, torch.nn.Parameter)


def _quantize(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """The reference, some rows at a time, because they are copied. ``x``: ``[n, d]``."""
    d = x.shape[1]
    for start, stop in tile_ranges(len(x), d * scales.element_size(), tile_bytes(x.device)):
        blocks = _in_blocks(x[start:stop].to(scales.dtype))
        largest = blocks.abs().amax(2)
        scales[start:stop] = largest / 127
        reciprocal = torch.where(largest >= _SMALLEST, 127 / largest, 0)
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
