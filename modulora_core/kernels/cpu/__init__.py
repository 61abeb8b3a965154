"""Tools for a plugin's numba kernels. Importing this package imports numba."""

from __future__ import annotations

from modulora_core.kernels.cpu.cpu_kernels import CPUKernels
from modulora_core.kernels.loading import jit

__all__ = ["CPUKernels", "jit"]
