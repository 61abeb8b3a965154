"""The toolkit for plugins with kernels. Importing it imports neither numba nor Triton.

    KernelQuantizer     a quantizer that runs Triton's kernels on a GPU, numba's on a CPU, plain torch elsewhere

    kernels.cpu         for modules of numba kernels: CPUKernels and its tools
    kernels.triton      for modules of Triton kernels: tile, product and their tools

A plugin may import the names in ``__all__`` of these three packages. All other modules are the toolkit's own.
"""

from __future__ import annotations

from modulora_core.kernels.launching import (
    MOST_ROWS_BY_AMX,
    PARTIAL_SUMS,
    ROUNDING_BYTES,
    check_tensors,
    filled_tile,
    fp32_input,
    launch,
    like_input,
    one_thread,
    operands,
    product_of_one,
    room_for,
    rows_of,
    run,
)
from modulora_core.kernels.loading import (
    for_device,
    jit,
    load,
    load_triton,
    triton_is_interpreted,
)
from modulora_core.kernels.quantizer import KernelQuantizer

__all__ = [
    "MOST_ROWS_BY_AMX",
    "PARTIAL_SUMS",
    "ROUNDING_BYTES",
    "KernelQuantizer",
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
    "room_for",
    "rows_of",
    "run",
    "triton_is_interpreted",
]
