"""BlockLDLQ and coordinate descent, fast: groups of columns, and one matrix product for each group.

Both parts of QuIP# round a block of columns given the errors E = W − Ŵ of other blocks::

    Ŵ_k = Q(W_k + Σ_j E_j P_jk)

    BlockLDLQ             P = L, and E is still zero for blocks before k          section 4.1
    coordinate descent    P_jk = H_jk H_kk⁻¹

So one loop serves both. It computes as :mod:`modulora_quip_sharp_e8.reference` does, except for the
order of sums. Symbols are the reference's too.
"""

from __future__ import annotations

from types import ModuleType

import modulora_kernels as kernels
import numpy as np
import torch
from modulora_kernels import incoherence
from modulora_kernels.both_sides import round_in_turn
from torch import Tensor

from modulora_core.dense_products import add_product, product
from modulora_quip_sharp_e8 import SPEC, codebooks, reference
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.reference import Options, Solution

GROUP = 128
"""Columns of a group: the feedback inside of it fits a core's L2 cache."""


def solve(
    weight: Tensor, hessian: Tensor, options: Options, output_hessian: Tensor | None = None
) -> Solution:
    """Quantize ``weight``.

    Args:
        weight: ``[M, N]``, any float dtype, any strides, finite; unchanged.
        hessian: H = E[xxᵀ], ``[N, N]``, symmetric, positive semidefinite. Only its ratios matter.
        options: the user's choices.
        output_hessian: None, or H_O of the outputs, ``[M, M]``: then rows are rounded in turn
            (:mod:`modulora_kernels.both_sides`).

    Returns:
        the quantized weight on ``weight``'s device, the same bytes for any number of threads.

    Raises:
        ShapeError: a second moment does not fit ``weight``.
        WeightError: NaN or Inf in one of them, or one is no second moment.
    """
    problem = reference.prepare(weight, hessian, options, output_hessian)
    W, bits = problem.W, options.bits
    codes, residual = _empty_codes(W, bits)
    L = reference.feedback(problem.H, options.damping)
    P = incoherence.descent(problem.H, BLOCK) if options.rounds else L

    def round_rows(T: Tensor, rows: slice) -> Tensor:
        rounding = _Rounding(T, bits, codes[rows], None if residual is None else residual[rows])
        rounding.run(L, lower=True)
        for _ in range(options.rounds):
            rounding.run(P, lower=False)
        return rounding.E

    round_in_turn(SPEC.name, W, problem.H_O, round_rows)
    return reference.solution(problem, codes, residual)


def nearest(V: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """The codes of the points nearest to rows of V, ``[M, 8]``, and of their residuals.

    Both are as columns of :class:`~modulora_quip_sharp_e8.reference.Solution`'s, ``[M, 1]``."""
    codes, residual = _empty_codes(V, bits)
    _Rounding(V, bits, codes, residual).run(V.new_zeros(BLOCK, BLOCK), lower=True)
    return codes, residual


def _empty_codes(W: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    shape = len(W), W.shape[1] // BLOCK
    codes = torch.empty(shape, dtype=torch.int16, device=W.device)
    dtype = {2: None, 3: torch.uint8, 4: torch.int16}[bits]
    return codes, None if dtype is None else torch.empty_like(codes, dtype=dtype)


class _Rounding:
    """The codes of W so far.

    Attributes:
        E: W − Ŵ, ``[M, N8]``; zero where nothing is rounded yet.
        codes, residual: as in :class:`~modulora_quip_sharp_e8.reference.Solution`; written.
    """

    def __init__(self, W: Tensor, bits: int, codes: Tensor, residual: Tensor | None) -> None:
        self.W, self.bits = W, bits
        self.E = torch.zeros_like(W)
        self.codes, self.residual = codes, residual
        self._cpu: ModuleType | None = None
        if W.dtype == torch.float32:
            self._cpu = kernels.load("modulora_quip_sharp_e8.kernels.rounding", W.device)

    def run(self, P: Tensor, *, lower: bool) -> None:
        """Round every block once, the last one first, given the errors of the others.

        Args:
            P: ``[N8, N8]``, with zeros in its diagonal blocks.
            lower: whether P has blocks below the diagonal only.
        """
        columns = self.W.shape[1]
        for start in reversed(range(0, columns, GROUP)):
            stop = min(start + GROUP, columns)
            feeds = P[:, start:stop].contiguous()
            base = product(self.E[:, stop:], feeds[stop:])
            if not lower:
                add_product(base, self.E[:, :start], feeds[:start])
            self._round(start, base, feeds[start:stop], lower)

    def _round(self, start: int, base: Tensor, P: Tensor, lower: bool) -> None:
        """Round the group from column ``start`` on.

        Args:
            base: Σ_j E_j P_jk over blocks j outside of the group, ``[M, n]``.
            P: the group's own part, ``[n, n]``.
        """
        if self._cpu is not None:
            ratio = codebooks.RESIDUAL_SCALE.get(self.bits, 1.0)
            scales = np.float32(ratio), np.float32(1 / ratio)
            kernels.launch(
                self._cpu.round_group, self.W, base, P, self.E, start, lower, scales, self.codes,
                self.residual,
            )  # fmt: skip
            return
        for k in range(base.shape[1] - BLOCK, -1, -BLOCK):
            here = slice(start + k, start + k + BLOCK)
            feeding = slice(k + BLOCK if lower else 0, None)
            E = self.E[:, start : start + base.shape[1]][:, feeding]
            target = self.W[:, here] + base[:, k : k + BLOCK] + E @ P[feeding, k : k + BLOCK]
            (first, second), point = reference.quantize(target, self.bits)
            self.codes[:, here.start // BLOCK] = first
            if self.residual is not None:
                self.residual[:, here.start // BLOCK] = second
            self.E[:, here] = self.W[:, here] - point
