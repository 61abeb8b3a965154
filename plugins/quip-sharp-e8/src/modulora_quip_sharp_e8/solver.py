"""BlockLDLQ as it runs: groups of columns, what they mean for the others in one matrix product a group.

Both parts of the algorithm round a block of columns given the errors E = W − Ŵ of other blocks, Q(W_k + Σ_j E_j P_jk):
BlockLDLQ with P = L, where E is still zero for what comes later, and a sweep with P_jk = H_jk H_kk⁻¹. So they are one
loop. The values are those of :mod:`modulora_quip_sharp_e8.reference` up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.devices.dense_products import add_product, product
from modulora_quip_sharp_e8 import codebooks, reference
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.reference import Solution

GROUP = 128
"""Columns of a group: the feedback inside of it fits a core's L2 cache."""


def solve(weight: Tensor, hessian: Tensor, options: Options) -> Solution:
    """Quantize ``weight``.

    Args:
        weight: ``[M, N]``, any float dtype, any strides, finite. It isn't changed.
        hessian: H = E[xxᵀ], ``[N, N]``, symmetric, positive semidefinite. A factor common to all of it has no effect.
        options: bits, rescaling and sweeps.

    Returns:
        the quantized weight, on ``weight``'s device; the same bytes for any number of threads that kernels run on.

    Raises:
        ShapeError: ``hessian`` doesn't fit ``weight``.
        WeightError: NaN or Inf in either, or ``hessian`` can't be a second moment.
    """
    problem = reference.prepare(weight, hessian, options)
    cpu = None
    if problem.W.dtype == torch.float32:
        cpu = kernels.load("modulora_quip_sharp_e8.cpu_solver", problem.W.device)
    rounding = (
        _Rounding(problem.W, options.bits)
        if cpu is None
        else _Compiled(problem.W, options.bits, cpu)
    )
    rounding.run(reference.feedback(problem.H, options.damping), lower=True)
    if options.rounds:
        P = reference.descent(problem.H)
        for _ in range(options.rounds):
            rounding.run(P, lower=False)
    return problem.solution(rounding.codes, rounding.residual)


class _Rounding:
    """The codes of W as they are found, in plain torch: for other devices, fp64, and without numba.

    Attributes:
        E: W − Ŵ, ``[M, N8]``; zero where nothing is rounded yet.
        codes, residual: as in :class:`~modulora_quip_sharp_e8.reference.Solution`.
    """

    def __init__(self, W: Tensor, bits: int) -> None:
        self.W, self.bits = W, bits
        self.E = torch.zeros_like(W)
        blocks = (len(W), W.shape[1] // BLOCK)
        self.codes = torch.empty(blocks, dtype=torch.int16, device=W.device)
        self.residual: Tensor | None = None
        if bits > 2:
            self.residual = torch.empty_like(
                self.codes, dtype=torch.uint8 if bits == 3 else torch.int16
            )

    def run(self, P: Tensor, *, lower: bool) -> None:
        """Round every block once, the last one first, each given the errors of the others.

        Args:
            P: ``[N8, N8]``: block j's error counts for block k as ``E_j P_jk``. No block feeds itself.
            lower: whether only later blocks feed earlier ones.
        """
        columns = self.W.shape[1]
        for start in reversed(range(0, columns, GROUP)):
            stop = min(start + GROUP, columns)
            feeds = P[:, start:stop].contiguous()
            base = product(self.E[:, stop:], feeds[stop:])
            if not lower:
                add_product(base, self.E[:, :start], feeds[:start])
            inside = feeds[start:stop]
            self.group(start, base, inside, lower)

    def group(self, start: int, base: Tensor, P: Tensor, lower: bool) -> None:
        """Round the columns from ``start`` on, given what others feed to them, ``[M, n]``, and their own P ``[n, n]``."""
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


class _Compiled(_Rounding):
    """The same with a kernel for the inside of a group: for the CPU, in fp32."""

    def __init__(self, W: Tensor, bits: int, cpu: Any) -> None:
        super().__init__(W, bits)
        self.cpu = cpu
        ratio = codebooks.RESIDUAL_SCALE.get(bits, 1.0)
        self.scales = torch.tensor([ratio, 1 / ratio])

    def group(self, start: int, base: Tensor, P: Tensor, lower: bool) -> None:
        residual = self.codes if self.residual is None else self.residual
        kernels.launch(
            self.cpu.group,
            self.W,
            base,
            P,
            self.E,
            start,
            lower,
            self.bits,
            self.scales,
            self.codes,
            residual,
        )
