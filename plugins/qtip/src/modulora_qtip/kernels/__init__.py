"""Compiled code: numba's for CPUs (cpu.py), Triton's for GPUs (gpu.py). The method needs none."""
