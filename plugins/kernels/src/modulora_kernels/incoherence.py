"""Incoherence processing and the factors of BlockLDLQ, for quantizers in a rotated basis.

Symbols of Tseng, Chee, Sun, Kuleshov, De Sa 2024 (arXiv 2402.04396):

    W         the weight, [M, N]; rows are quantized apart, and all share H
    H         E[x xᵀ], [N, N]; the proxy error is tr((Ŵ − W) H (Ŵ − W)ᵀ)              equation 1
    H_n       the orthogonal matrix of :mod:`modulora_kernels.rotation`               section 3
    S_U, S_V  random signs, [N] and [M]                                                algorithm 3
    W̃, H̃      W and H in the rotated basis: H_Mᵀ S_V W S_U H_N, H_Nᵀ S_U H S_U H_N     algorithm 3
    H_O       second moment of the gradients in the outputs; H_Mᵀ S_V H_O S_V H_M in that basis
    L         unit block lower triangular, H̃ = L D Lᵀ                                 section 4.1
    s         rescaling of the columns, W s and x / s          arXiv 2307.13304, section 4.2
    t         the same of the rows, if H_O is known: t ∝ (diag H_O / diag WWᵀ)^¼

All is computed in fp64 if W is fp64, else in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core.dense_products import one_thread
from modulora_core.errors import ShapeError, WeightError
from modulora_core.hessians import check_hessian
from modulora_kernels import rotation

OUTPUT_DAMPING = 4.0
"""Added to the diagonal of H_O for the rescaling of rows, in units of its mean. Less would serve
gradients better, and let tr(E H Eᵀ) grow."""

DOUBLINGS = 16
"""Attempts to factorize H; each one after the second doubles the damping."""


@dataclass(frozen=True, slots=True)
class Problem:
    """The weight to round and its H, in the rotated basis.

        W ≈ scale · diag(output_scale) H_M W̃ H_Nᵀ diag(input_scale)

    Attributes:
        W: W̃ in units of the codebook, ``[M', N']``: M and N rounded up to whole blocks, with zeros.
        H: H̃, ``[N', N']``, symmetric; the identity in the added columns.
        input_scale: S_U, divided by the rescaling, fp16.
        output_scale: S_V, divided by the rescaling of rows, fp16.
        scale: one unit of the codebook, fp32 ``[1]``.
        H_O: None, or the rotated H_O, ``[M', M']``, with zeros in added rows.
    """

    W: Tensor
    H: Tensor
    input_scale: Tensor
    output_scale: Tensor
    scale: Tensor
    H_O: Tensor | None = None


def prepare(
    quantizer: str,
    weight: Tensor,
    hessian: Tensor,
    output_hessian: Tensor | None = None,
    *,
    rms: float,
    multiples: tuple[int, int],
    damping: float,
    rescale: bool,
    seed: int,
    block: int | None = None,
) -> Problem:
    """Incoherence processing (algorithm 3): damp H, rescale W and H, and rotate them.

    Args:
        quantizer: its name, for messages.
        weight: ``[M, N]``, any float dtype; unchanged.
        hessian: ``[N, N]``, symmetric, positive semidefinite. Only its ratios matter.
        output_hessian: None, or H_O, ``[M, M]``, of which this holds too.
        rms: root mean square of W̃ in units of the codebook.
        multiples: M' and N' are multiples of these.
        damping: share of the mean of H's diagonal that is added to it.
        rescale: whether to even out the sizes of columns and of their inputs before; and of rows
            and of their gradients, if H_O is given.
        seed: of the signs.
        block: None, or a power of two. Then W and H get zeros up to multiples of it, H_n is
            I ⊗ H_block, and ``output_scale`` holds the unit of the codebook: ``scale`` is 1.

    Raises:
        ShapeError: a second moment does not fit ``weight``, or the weight is empty.
        WeightError: NaN or Inf in one of them, or one is no second moment.
    """
    check_hessian(quantizer, weight, hessian, output_hessian)
    if not weight.numel():
        raise ShapeError(
            f"{quantizer}: expected a weight with rows and columns, got {list(weight.shape)}; "
            "leave the layer out with --exclude"
        )
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    W, H = weight.detach().to(dtype), hessian.detach().to(weight.device, dtype)
    H = H / _positive(H.diagonal().mean(dtype=torch.float64).to(dtype))
    if block is not None:
        M, N = (-n % block for n in W.shape)
        W, H = F.pad(W, (0, N, 0, M)), F.pad(H, (0, N, 0, N))
    M, N = W.shape
    H.diagonal().add_(damping)
    # squares of fp32 overflow; a power of two changes no digit
    power = torch.exp2(torch.frexp(W.abs().amax()).exponent.clamp(-126, 126).to(dtype))
    W = W / power
    size = _rms(W)
    W = W / _positive(size)
    H_O, t = None, W.new_ones(M)
    if output_hessian is not None:
        H_O = F.pad(output_hessian.detach().to(W), (0, M - len(output_hessian)) * 2)
        if rescale:
            damped = H_O.diagonal() + OUTPUT_DAMPING * _positive(H_O.diagonal().mean())
            t = _rescaling(W.T, damped)
    s = _rescaling(W * t[:, None], H.diagonal()) if rescale else W.new_ones(N)
    # both are rounded to the stored dtype before they are used
    S_U = (rotation.signs(seed, N, "input").to(s) / s).to(torch.float16)
    S_V = (rotation.signs(seed, M, "output").to(t) / t).to(torch.float16)
    W = rotation.rotate(W / S_U.to(dtype), in_place=True, block=block)
    W = rotation.rotate(W.T / S_V.to(dtype), in_place=True, block=block).T
    H = rotated(H, S_U, block)
    if H_O is not None:
        H_O = F.pad(rotated(H_O, S_V, block), (0, -M % multiples[0]) * 2)
    unit = _positive(_rms(W)) / rms
    scale = (size * unit * power).to(torch.float32).reshape(1)  # 0 for a weight of zeros
    if block is not None:
        unit = unit * (scale.half().to(dtype) / _positive(scale))
        S_V, scale = S_V * scale.half(), torch.ones_like(scale)
    W, H = _whole_blocks(W / _positive(unit), H, multiples)
    return Problem(W, H, S_U, S_V, scale, H_O)


def rotated(H: Tensor, scale: Tensor, block: int | None) -> Tensor:
    """H_nᵀ diag(s) H diag(s) H_n for a symmetric H, which is overwritten; s is fp16 ``[n]``."""
    H = rotation.rotate(H, scale, in_place=True, block=block)
    H = rotation.rotate(H.T.contiguous(), scale, in_place=True, block=block)
    return (H + H.T) / 2


def _rms(W: Tensor) -> Tensor:
    return W.square().mean(dtype=torch.float64).sqrt().to(W.dtype)


def _positive(x: Tensor) -> Tensor:
    """A divisor: 1 instead of 0, as for a weight of zeros."""
    return torch.where(x > 0, x, torch.ones_like(x))


def _rescaling(W: Tensor, moments: Tensor) -> Tensor:
    """Evens out columns by s ∝ (h / diag WᵀW)^¼: (W s)ᵀ W s gets the diagonal h / s².

    ``moments``: h, the diagonal of H."""
    weights = W.square().mean(dim=0)
    s = (moments / weights.clamp(min=1e-6 * float(_positive(weights.mean())))) ** 0.25
    return (s / s.mean()).clamp(2.0**-12, 2.0**12)


def _whole_blocks(W: Tensor, H: Tensor, multiples: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, columns = (-n % multiple for n, multiple in zip(W.shape, multiples, strict=True))
    if columns:
        H = F.pad(H, (0, columns, 0, columns))
        H.diagonal()[-columns:] = 1
    return F.pad(W, (0, columns, 0, rows)).contiguous(), H


def feedback(quantizer: str, H: Tensor, block: int, damping: float) -> Tensor:
    """L − I, block lower triangular, ``[N', N']`` in H's dtype: H = L D Lᵀ (section 4.1).

    L = C blockdiag(C_kk)⁻¹ with the Cholesky factor C. If H can't be factorized, it is tried again
    in fp64, then with ``damping`` on the diagonal, doubling.

    Raises:
        WeightError: no damping helps, so H is not positive semidefinite.
    """
    C = _cholesky(quantizer, H, damping)
    columns = C.unflatten(1, (-1, block)).transpose(0, 1)  # [blocks, N', block]
    L = torch.linalg.solve_triangular(diagonal_blocks(C, block), columns, upper=False, left=False)
    return _without_diagonal(L, H.dtype)


def descent(H: Tensor, block: int) -> Tensor:
    """H_jk H_kk⁻¹ for j ≠ k, zero for j = k, ``[N', N']``: a sweep feeds it from block j to k."""
    columns = H.unflatten(1, (-1, block)).transpose(0, 1)  # [blocks, N', block]
    P = torch.linalg.solve(diagonal_blocks(H, block), columns, left=False)
    return _without_diagonal(P, H.dtype)


def diagonal_blocks(H: Tensor, block: int) -> Tensor:
    """H_kk, ``[blocks, block, block]``."""
    blocks = H.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    diagonal: Tensor = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return diagonal


def _without_diagonal(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix from its columns of blocks, ``[blocks, N', block]``, with zeros on the diagonal."""
    block = columns.shape[2]
    P = columns.transpose(0, 1).flatten(1).to(dtype).contiguous()
    for k in range(0, len(P), block):
        P[k : k + block, k : k + block] = 0
    return P


def _cholesky(quantizer: str, H: Tensor, damping: float) -> Tensor:
    more, wide = 0.0, H
    with one_thread():
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
        f"{quantizer}: expected a positive semidefinite second moment, got one of shape "
        f"{list(H.shape)} that can't be factorized with {more / 2:g} times its mean on the "
        "diagonal; calibrate again"
    )


def proxy_error(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ) (equation 1), in fp64."""
    W, E, H = W.double(), W.double() - W_hat.double(), H.double()
    return float((E @ H * E).sum() / (W @ H * W).sum())
