"""Rounds the rows of a weight in turn, so that each makes up for the errors of earlier ones.

Errors E = W − Ŵ of a layer increase the loss in proportion to tr(H_O E H Eᵀ). H is the second
moment of the layer's inputs, H_O is the second moment of the gradients in its outputs. A quantizer
that rounds each row for itself uses H alone. Here it rounds blocks of rows in turn, the last one
first, and each gets the errors of the blocks before it (Tseng, Sun, De Sa 2025, arXiv 2505.22988):

    Ŵ_k = Q(W_k + Σ_j L_jkᵀ E_j)      H_O + λI = L D Lᵀ, L unit block lower triangular
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modulora_core.dense_products import product
from modulora_kernels import incoherence

MULTIPLE, LARGEST, TURNS = 16, 64, 16
"""Blocks have a multiple of 16 rows, and at most 64. The rows of a block cannot make up for each
other's errors, so fewer than 16 blocks gain less. Smaller blocks leave less work for threads."""

DAMPING = 4.0
"""λ, in units of the mean of H_O's diagonal. H_O of some thousand tokens is noisy."""


def round_in_turn(
    quantizer: str,
    W: Tensor,
    output_hessian: Tensor | None,
    round_rows: Callable[[Tensor, slice], Tensor],
) -> None:
    """Round all rows of ``W``: block by block with an H_O, all at once without one.

    Args:
        quantizer: its name, for messages.
        W: ``[M, N]``, fp32 or fp64.
        output_hessian: H_O, ``[M, M]``, in W's basis and dtype; only its ratios matter.
        round_rows: ``round_rows(T, rows)`` rounds ``T``, ``[m, N]``, stores the codes of these rows
            of W, and returns T − Ŵ. ``rows`` starts at a multiple of 16.

    Raises:
        WeightError: H_O is not positive semidefinite.
    """
    if output_hessian is None:
        round_rows(W, slice(0, len(W)))
        return
    block = block_rows(len(W))
    L = _feedback(quantizer, output_hessian, block)
    E = torch.zeros_like(W)
    for start in reversed(range(0, len(W), block)):
        rows, later = slice(start, start + block), slice(start + block, None)
        fed = product(L[later, rows].T.contiguous(), E[later])
        E[rows] = round_rows(W[rows] + fed, rows) - fed


def block_rows(rows: int) -> int:
    """The number of rows that are rounded at once."""
    return min(max(rows // TURNS // MULTIPLE * MULTIPLE, MULTIPLE), LARGEST)


def _feedback(quantizer: str, output_hessian: Tensor, block: int) -> Tensor:
    """L − I, ``[M, M]``, where a block has ``block`` rows."""
    mean = output_hessian.diagonal().mean()
    H = output_hessian / torch.where(mean > 0, mean, 1)
    H.diagonal().add_(DAMPING)
    rest = -len(H) % block
    H = torch.block_diag(H, torch.eye(rest).to(H)) if rest else H
    L = incoherence.feedback(quantizer, H, block, DAMPING)
    return L[: len(output_hessian), : len(output_hessian)]
