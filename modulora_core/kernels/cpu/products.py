"""The former home of :class:`~modulora_core.kernels.cpu.cpu_kernels.CPUKernels`."""

from modulora_core.kernels.cpu.cpu_kernels import RowKernels

__all__ = ["RowKernels"]
