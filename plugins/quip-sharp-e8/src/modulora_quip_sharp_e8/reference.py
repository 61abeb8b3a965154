"""QuIP# in plain torch, as in the paper: the truth for packing.py and the kernels.

Symbols of QuIP# (Tseng, Chee, Sun, Kuleshov, De Sa 2024, arXiv 2402.04396):

    W         the weight, [M, N]; rows are quantized apart, and all share H
    H         E[x xᵀ], [N, N]; the proxy error is tr((Ŵ − W) H (Ŵ − W)ᵀ)              equation 1
    H_n       the orthogonal matrix of :mod:`modulora_core.kernels.rotation`               section 3
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
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.errors import WeightError
from modulora_core.kernels import rotation
from modulora_core.spec import check_hessian
from modulora_quip_sharp_e8 import SPEC, codebooks
from modulora_quip_sharp_e8.codebooks import BLOCK

SCRATCH_BYTES = 256 * 2**20
"""For the distances of some vectors to all points."""

DOUBLINGS = 16
"""Attempts to factorize H; each one after the second doubles the damping."""


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


@dataclass(frozen=True, slots=True)
class Problem:
    """The weight to round and its H, in the rotated basis.

    Attributes:
        W: W̃ in units of the codebook, ``[M, N8]``; N8 is N rounded up to whole blocks, with zeros.
        H: H̃, ``[N8, N8]``, symmetric; the identity in the added columns.
        input_scale, output_scale, scale: as in :class:`Solution`.
    """

    W: Tensor
    H: Tensor
    input_scale: Tensor
    output_scale: Tensor
    scale: Tensor

    def solution(self, codes: Tensor, residual: Tensor | None) -> Solution:
        return Solution(codes, residual, self.input_scale, self.output_scale, self.scale)


def prepare(weight: Tensor, hessian: Tensor, options: Options) -> Problem:
    """Incoherence processing (algorithm 3): damp H, rescale W and H, and rotate them.

    Args:
        weight: ``[M, N]``, any float dtype; unchanged.
        hessian: ``[N, N]``, symmetric, positive semidefinite. Only its ratios matter.
        options: the user's choices.

    Raises:
        ShapeError: ``hessian`` does not fit ``weight``.
        WeightError: NaN or Inf in either, or ``hessian`` is no second moment.
    """
    check_hessian(SPEC.name, weight, hessian)
    M, N = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    W, H = weight.detach().to(dtype), hessian.detach().to(weight.device, dtype)
    H = H / _positive(H.diagonal().mean(dtype=torch.float64).to(dtype))
    H.diagonal().add_(options.damping)
    # squares of fp32 overflow; a power of two changes no digit
    power = torch.exp2(torch.frexp(W.abs().amax()).exponent.clamp(-126, 126).to(dtype))
    W = W / power
    rms = _rms(W)
    W = W / _positive(rms)
    s = _rescaling(W, H) if options.rescale else W.new_ones(N)
    # both are rounded to the stored dtype before they are used
    S_U = (rotation.signs(options.seed, N, "input").to(s) / s).to(torch.float16)
    S_V = rotation.signs(options.seed, M, "output").to(W.device, torch.float16)
    W = rotation.rotate(W / S_U.to(dtype), in_place=True)
    W = rotation.rotate(W.T.contiguous(), S_V, in_place=True).T
    H = rotation.rotate(H, S_U, in_place=True)
    H = rotation.rotate(H.T.contiguous(), S_U, in_place=True)
    unit = _positive(_rms(W)) / (options.codebook_scale or codebooks.OPT_SCALE[options.bits])
    scale = (rms * unit * power).to(torch.float32).reshape(1)  # 0 for a weight of zeros
    W, H = _whole_blocks(W / unit, (H + H.T) / 2)
    return Problem(W, H, S_U, S_V, scale)


def _rms(W: Tensor) -> Tensor:
    return W.square().mean(dtype=torch.float64).sqrt().to(W.dtype)


def _positive(x: Tensor) -> Tensor:
    """A divisor: 1 instead of 0, as for a weight of zeros."""
    return torch.where(x > 0, x, torch.ones_like(x))


def _rescaling(W: Tensor, H: Tensor) -> Tensor:
    """The rescaling s = (diag H / diag WᵀW)^¼, about 1: W s and H / (s sᵀ) have one diagonal."""
    weights = W.square().mean(dim=0)
    s = (H.diagonal() / weights.clamp(min=1e-6 * float(_positive(weights.mean())))) ** 0.25
    return (s / s.mean()).clamp(2.0**-12, 2.0**12)


def _whole_blocks(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    more = -W.shape[1] % BLOCK
    if more == 0:
        return W.contiguous(), H
    H = F.pad(H, (0, more, 0, more))
    H.diagonal()[-more:] = 1
    return F.pad(W, (0, more)), H


def feedback(H: Tensor, damping: float) -> Tensor:
    """L − I, block lower triangular, ``[N8, N8]`` in H's dtype: H = L D Lᵀ (section 4.1).

    L = C blockdiag(C_kk)⁻¹ with the Cholesky factor C. If H can't be factorized, it is tried again
    in fp64, then with ``damping`` on the diagonal, doubling.

    Raises:
        WeightError: no damping helps, so H is not positive semidefinite.
    """
    C = _cholesky(H, damping)
    columns = C.unflatten(1, (-1, BLOCK)).transpose(0, 1)  # [blocks, N8, 8]
    L = torch.linalg.solve_triangular(_diagonal_blocks(C), columns, upper=False, left=False)
    return _without_diagonal(L, H.dtype)


def descent(H: Tensor) -> Tensor:
    """H_jk H_kk⁻¹ for j ≠ k, zero for j = k, ``[N8, N8]``: a sweep feeds it from block j to k."""
    columns = H.unflatten(1, (-1, BLOCK)).transpose(0, 1)  # [blocks, N8, 8]
    return _without_diagonal(torch.linalg.solve(_diagonal_blocks(H), columns, left=False), H.dtype)


def _diagonal_blocks(H: Tensor) -> Tensor:
    """H_kk, ``[blocks, 8, 8]``."""
    blocks = H.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    diagonal: Tensor = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return diagonal


def _without_diagonal(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix from its columns of blocks, ``[blocks, N8, 8]``, with zeros in diagonal blocks."""
    P = columns.transpose(0, 1).flatten(1).to(dtype).contiguous()
    for k in range(0, len(P), BLOCK):
        P[k : k + BLOCK, k : k + BLOCK] = 0
    return P


def _cholesky(H: Tensor, damping: float) -> Tensor:
    more, wide = 0.0, H
    with kernels.one_thread():
        for attempt in range(DOUBLINGS):
            tried = wide.clone()
            tried.diagonal().add_(more * float(H.diagonal().mean()))
            C, failed = torch.linalg.cholesky_ex(tried)
            if not bool(failed):
                factor: Tensor = C
                return factor
            more = 0.0 if attempt == 0 else max(damping, 2 * more)
            wide = H.double()
    raise WeightError(
        "quip-sharp-e8: expected a positive semidefinite second moment, got one of shape "
        f"{list(H.shape)} that can't be factorized with {more / 2:g} times its mean on the "
        "diagonal; calibrate again"
    )


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
    return problem.solution(torch.stack(first, dim=1), residual)


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


def proxy_error(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ) (equation 1), in fp64."""
    W, E, H = W.double(), W.double() - W_hat.double(), H.double()
    return float((E @ H * E).sum() / (W @ H * W).sum())
