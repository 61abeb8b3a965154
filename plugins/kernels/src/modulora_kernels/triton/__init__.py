"""Tools for a plugin's Triton kernels. Importing this package imports Triton.

GPUKernels                   tiles and products of few rows, around a decoder
block, ceil_div,             tools for decoders
interleaved, spread,
times_group
write_tile, few_rows,        the two kernels themselves, for a format that GPUKernels does not fit
multiply
launch, Config, dot,         for a kernel of your own
rounded
"""

from __future__ import annotations

from modulora_kernels.triton.blocks import (
    block,
    ceil_div,
    dot,
    interleaved,
    rounded,
    spread,
    times_group,
)
from modulora_kernels.triton.gpu_kernels import GPUKernels
from modulora_kernels.triton.launching import Config, launch
from modulora_kernels.triton.products import few_rows, multiply
from modulora_kernels.triton.tiles import ALIGNED, write_tile

__all__ = [
    "ALIGNED",
    "Config",
    "GPUKernels",
    "block",
    "ceil_div",
    "dot",
    "few_rows",
    "interleaved",
    "launch",
    "multiply",
    "rounded",
    "spread",
    "times_group",
    "write_tile",
]
