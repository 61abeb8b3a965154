"""The toolkit for plugins with kernels. Importing it imports neither numba nor Triton.

    KernelQuantizer     a quantizer that runs Triton on a GPU, numba on a CPU, plain torch elsewhere
    for_device          its module of kernels for a device, or None
    load, load_triton   another module of kernels, for example a solver's
    check_layout        refuse a layout that its metadata does not imply, when a file is opened
    check_tensors       refuse packed tensors that do not match their metadata
    operands, launch    tensors as arrays, and kernels on torch's threads
    filled_tile         a tile in any dtype, from a kernel that writes fp32
    one_thread          torch on one thread, for the same last bits everywhere
    without_autocast    torch without autocast, for a device of any type

    .cpu                for modules of numba kernels: CPUKernels and its tools
    .triton             for modules of Triton kernels: GPUKernels and its tools
    .rotation           random Hadamard transforms, for quantizers in a rotated basis
    .rotated            RotatedQuantizer: products and tiles in a rotated basis
    .incoherence        the weight and H in that basis, and the factors of BlockLDLQ
    .both_sides         rounding of rows in turn, by the second moment of the gradients
    .scalar_grid        ScalarGrid: `snap`, for codes of single weights
    .feedback           a weight rounded to the grid of a packed one
    .parity             compare a quantizer's kernels with plain torch

A plugin may import the names in ``__all__`` of these packages, and nothing deeper.
"""

from __future__ import annotations

from modulora_core.dense_products import one_thread, without_autocast
from modulora_kernels.compiled import (
    for_device,
    jit,
    load,
    load_triton,
    triton_is_interpreted,
)
from modulora_kernels.kernel_quantizer import KernelQuantizer
from modulora_kernels.launching import (
    PARTIAL_SUMS,
    check_layout,
    check_tensors,
    filled_tile,
    fp32_input,
    launch,
    like_input,
    operands,
    product_of_one,
    run,
)

__all__ = [
    "PARTIAL_SUMS",
    "KernelQuantizer",
    "check_layout",
    "check_tensors",
    "filled_tile",
    "for_device",
    "fp32_input",
    "jit",
    "launch",
    "like_input",
    "load",
    "load_triton",
    "one_thread",
    "operands",
    "product_of_one",
    "run",
    "triton_is_interpreted",
    "without_autocast",
]
