"""Random Hadamard transforms: rotations that spread weights and activations (arXiv 2402.04396).

    rotate                   (x ⊙ s) H_n, by numba, Triton or plain torch
    matrix, factor, order    H_n and its factor M_K, by their definition
    signs                    random signs, the same forever

    hadamard, decompose      Hadamard matrices
    rotate_rows, factors     in ``rotation.cpu``: for a numba kernel that rotates by itself

A plugin may import these names, and nothing deeper.
"""

from __future__ import annotations

from modulora_kernels.rotation.hadamard import LARGEST_ORDER, decompose, hadamard
from modulora_kernels.rotation.transform import factor, matrix, order, rotate, signs

__all__ = ["LARGEST_ORDER", "decompose", "factor", "hadamard", "matrix", "order", "rotate", "signs"]
