"""QuIP# in plain torch, as in the paper: the truth for packing.py and the kernels.

Symbols of QuIP# (Tseng, Chee, Sun, Kuleshov, De Sa 2024, arXiv 2402.04396):

    W         the weight, [M, N]; rows are quantized apart, and all share H
    H         E[x xᵀ], [N, N]; the proxy error is tr((Ŵ − W) H (Ŵ − W)ᵀ)              equation 1
    H_n       the orthogonal matrix of :mod:`modulora_kernels.rotation`               section 3
    S_U, S_V  random signs, [N] and [M]                                                algorithm 3
    W̃, H̃      W and H in the rotated basis: H_Mᵀ S_V W S_U H_N, H_Nᵀ S_U H S_U H_N     algorithm 3
    L         unit block lower triangular, 8 × 8 blocks, H̃ = L D Lᵀ                   section 4.1
    Q         rounds eight weights to a point of the codebook                          section 4.2
    s         rescaling of the columns, W s and x / s          QuIP (arXiv 2307.13304), section 4.2

All is computed in fp64 if W is fp64, else in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from modulora_kernels import incoherence, rotation
from modulora_kernels.incoherence import Problem
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_quip_sharp_e8 import SPEC, codebooks
from modulora_quip_sharp_e8.codebooks import BLOCK

SCRATCH_BYTES = 256 * 2**20
"""For the distances of some vectors to all points."""


class Options(BaseModel):
    """How a weight is quantized. The defaults measured best (README, Quality)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bits: Literal[2, 3, 4] = Field(2, description="bits of a weight: 2, 3 or 4")
    rescale: bool = Field(
        True, description="before rotating, even out the sizes of columns and of their inputs"
    )
    sweeps: int | None = Field(
        None,
        ge=0,
        le=100,
        description="rounds of coordinate descent after BlockLDLQ; by default 4, or none at 4 bits",
    )
    damping: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of the mean of H's diagonal that is added to it; "
        "it grows if H can't be factorized",
    )
    codebook_scale: float | None = Field(
        None,
        gt=0.1,
        lt=10,
        description="root mean square of the rotated weights in units of the codebook; "
        "by default the best for a Gaussian",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the random signs")

    @property
    def rounds(self) -> int:
        """:attr:`sweeps`, or its default: at 4 bits a sweep overfits the samples."""
        return self.sweeps if self.sweeps is not None else 0 if self.bits == 4 else 4


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight: Ŵ = scale · diag(output_scale) H_M C H_Nᵀ diag(input_scale).

    Attributes:
        codes: int16 ``[M, ⌈N/8⌉]``, the bits of unsigned codes; decoded they are C.
        residual: codes of the residual: None at 2 bits, uint8 at 3, int16 at 4.
        input_scale: fp16 ``[N]``: S_U, divided by the rescaling s.
        output_scale: fp16 ``[M]``: S_V.
        scale: fp32 ``[1]``: one unit of the codebook.
    """

    codes: Tensor
    residual: Tensor | None
    input_scale: Tensor
    output_scale: Tensor
    scale: Tensor

    def dequantize(self, bits: int) -> Tensor:
        """Ŵ, fp64 ``[M, N]``, by dense matrices."""
        M, N = len(self.output_scale), len(self.input_scale)
        H_M, H_N = (rotation.matrix(n) for n in (M, N))
        C = codebooks.decode(self.codes, self.residual, bits)[:, :N].double()
        S_V, S_U = self.output_scale.double()[:, None], self.input_scale.double()
        return self.scale.double() * S_V * (H_M @ C @ H_N.T) * S_U


def prepare(
    weight: Tensor, hessian: Tensor, options: Options, output_hessian: Tensor | None = None
) -> Problem:
    """Incoherence processing (algorithm 3): damp H, rescale W and H, and rotate them.

    Args and Raises: as :func:`modulora_kernels.incoherence.prepare`.
    """
    return incoherence.prepare(
        SPEC.name,
        weight,
        hessian,
        output_hessian,
        rms=options.codebook_scale or codebooks.OPT_SCALE[options.bits],
        multiples=(1, BLOCK),
        damping=options.damping,
        rescale=options.rescale,
        seed=options.seed,
    )


def solution(problem: Problem, codes: Tensor, residual: Tensor | None) -> Solution:
    scales = problem.input_scale, problem.output_scale, problem.scale
    return Solution(codes, residual, *scales)


def feedback(H: Tensor, damping: float) -> Tensor:
    """L − I for 8 × 8 blocks: :func:`modulora_kernels.incoherence.feedback`."""
    return incoherence.feedback(SPEC.name, H, BLOCK, damping)


def solve(weight: Tensor, hessian: Tensor, options: Options) -> Solution:
    """Quantize ``weight`` by BlockLDLQ (section 4.1), then by rounds of coordinate descent.

    Args and Raises: as :func:`prepare`.
    """
    problem = prepare(weight, hessian, options)
    W, H = problem.W, problem.H
    blocks = range(W.shape[1] - BLOCK, -1, -BLOCK)  # the last first
    L, W_hat = feedback(H, options.damping), W.clone()
    codes = {}
    for k in blocks:
        here, after = slice(k, k + BLOCK), slice(k + BLOCK, None)
        target = W[:, here] + (W - W_hat)[:, after] @ L[after, here]
        codes[k], W_hat[:, here] = quantize(target, options.bits)
    for _ in range(options.rounds):
        for k in blocks:
            here = slice(k, k + BLOCK)
            E = (W - W_hat) @ H[:, here]
            target = W_hat[:, here] + torch.linalg.solve(H[here, here], E, left=False)
            codes[k], W_hat[:, here] = quantize(target, options.bits)
    first, second = zip(*(codes[k] for k in reversed(blocks)), strict=True)
    residual = None if options.bits == 2 else torch.stack(second, dim=1)
    return solution(problem, torch.stack(first, dim=1), residual)


def quantize(x: Tensor, bits: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Q of ``x``, ``[M, 8]``: its codes, the residual's codes, and the point ``[M, 8]``."""
    first, point = _nearest(x, codebooks.on(codebooks.e8p, x.device))
    if bits == 2:
        return (first.to(torch.int16), first[:0]), point
    table, dtype = (codebooks.e81, torch.uint8) if bits == 3 else (codebooks.e8p, torch.int16)
    residual = (x - point) * codebooks.RESIDUAL_SCALE[bits]
    second, rest = _nearest(residual, codebooks.on(table, x.device))
    step = codebooks.residual_step(bits).to(x.device)
    return (first.to(torch.int16), second.to(dtype)), point + rest * step


def _nearest(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Index and value of the nearest point to each row of ``x``, some rows at a time."""
    table = table.to(x)
    chunks = x.split(max(1, SCRATCH_BYTES // (table.shape[0] * x.element_size())))
    index = torch.cat([codebooks.nearest_brute(chunk, table) for chunk in chunks])
    return index, table[index]
