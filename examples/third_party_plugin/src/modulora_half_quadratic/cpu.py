"""Half-quadratic weights on the CPU, compiled by numba: the bits of the reference.

A row is decoded as a whole, because its planes hold the codes in lines. Packing has no kernel,
because torch vectorizes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from modulora_kernels.cpu import CPUKernels, from_half, jit

from modulora_core.packed import PackedWeight


@jit(borrows=True)
def _take_line(plane, shift, mask, low, codes):
    """Add a line of a plane to the codes, from their bit ``low`` on."""
    for k in range(codes.size):
        codes[k] |= ((plane[k] >> shift) & mask) << low


@jit(borrows=True)
def _unpack(packed, bits, codes):
    """All codes of the row ``packed``, as :mod:`modulora_half_quadratic.packing` arranges them."""
    n = codes.size
    codes[:] = 0
    begin, low = 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            line = (n * width + 7) // 8
            plane = packed[begin : begin + line]
            mask = np.uint8((1 << width) - 1)
            for i in range(8 // width):
                part = codes[min(n, i * line) : min(n, (i + 1) * line)]
                _take_line(plane, np.uint8(i * width), mask, np.uint8(low), part)
            begin += line
            low += width


@jit(borrows=True)
def _scale(codes, scale, offset, out):
    for k in range(out.size):
        out[k] = np.float32(codes[k]) * scale + offset


@jit()
def decode(weight, row, start, columns, out):
    """Columns ``start ...`` of the rows from ``row`` on: see :class:`CPUKernels`."""
    packed, scales, offsets, unit, bits, group, n = weight
    codes = np.empty(n, np.uint8)
    for r in range(len(out)):
        o = row + r
        _unpack(packed[o], bits, codes)
        k = 0
        while k < columns:
            g = (start + k) // group
            stop = min(columns, (g + 1) * group - start)
            scale = from_half(scales[o, g]) * unit[0]
            offset = from_half(offsets[o, g]) * unit[0]
            _scale(codes[start + k : start + stop], scale, offset, out[r, k:stop])
            k = stop


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """The packed tensors, fp16 as its bits; bits, group size, and the length of a row."""
    tensors, metadata = packed.tensors, packed.metadata
    halves = (tensors[name].view(torch.int16) for name in ("scales", "offsets"))
    sizes = (metadata["bits"], metadata["group_size"], packed.shape[1])
    return (tensors["codes"], *halves, tensors["unit"], *sizes)


kernels = CPUKernels(decode, operands)
tile, product = kernels.tile, kernels.product
