"""Rounds a weight to the grid of a packed one, a column at a time, with feedback of the errors.

Symbols of OPTQ (Frantar et al. 2022, arXiv 2210.17323), section 3:

    V     the weight to round, [out, in];   Ŵ   its rounding;   E = V − Ŵ
    H     E[x xᵀ], [in, in]; the outputs' squared error is tr(E H Eᵀ)               equation 1
    λ     damping, added to the diagonal of H
    U     upper triangular, (H + λI)⁻¹ = Uᵀ U

Columns are rounded in the order of H's diagonal, and later columns make up for earlier errors.
Sweeps of coordinate descent follow: each column moves to the points that are best for it while all
other columns stay, q = Ŵⱼ + (E H)ⱼ / Hⱼⱼ. No move makes a row's error larger.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modulora_core.dense_products import add_product, one_thread, product
from modulora_core.errors import WeightError
from modulora_core.spec import PackedWeight, Quantizer, check_hessian

BLOCK = 128
"""Columns between two updates of all other columns, as in the paper."""

DOUBLINGS = 16
"""How often λ is doubled at most."""


def rounded_to_grid(
    quantizer: Quantizer,
    packed: PackedWeight,
    V: Tensor,
    hessian: Tensor,
    *,
    damping: float,
    sweeps: int = 0,
) -> PackedWeight:
    """``packed`` with other codes: its grid's Ŵ with a small tr((V − Ŵ) (H + λI) (V − Ŵ)ᵀ).

    Args:
        quantizer: of ``packed``; it :attr:`~modulora_core.spec.Quantizer.snaps`.
        V: fp32 ``[out, in]``.
        hessian: H, ``[in, in]``, symmetric, positive semidefinite. Its magnitude has no effect.
        damping: λ, as a share of the mean of H's diagonal.
        sweeps: of coordinate descent over all columns, after the feedback.

    Raises:
        ShapeError, WeightError: H does not fit, is not finite, or is no second moment.
    """
    check_hessian(quantizer.spec.name, V, hessian)
    diagonal = hessian.diagonal()
    alive = diagonal > 0  # other inputs were always zero: their weights had no effect
    H = hessian.to(V) / (float(diagonal[alive].mean()) if bool(alive.any()) else 1.0)
    H.diagonal()[~alive] = 1
    order = diagonal.argsort(descending=True, stable=True)
    H = H[order[:, None], order]
    U, lam = factor(quantizer.spec.name, H, damping)
    rows, columns = (0, len(V)), order.tolist()

    def snap(j: int, values: Tensor) -> Tensor:
        at = columns[j], columns[j] + 1
        return quantizer.snap(packed, rows, at, values[:, None])[:, 0]

    W = V.t()[order].contiguous()  # [in, out]: a column is one run of memory
    points = torch.empty_like(W)
    for start in range(0, len(W), BLOCK):
        stop = min(start + BLOCK, len(W))
        E = W.new_empty(stop - start, len(V))
        for j in range(start, stop):
            points[j] = snap(j, W[j])
            E[j - start] = (W[j] - points[j]) / U[j, j]
            W[j + 1 : stop].addr_(U[j, j + 1 : stop], E[j - start], alpha=-1)
        add_product(W[stop:], U[start:stop, stop:].t().neg(), E)
    if sweeps:
        H.diagonal().add_(lam)
        HE = product(H, V.t()[order] - points)
        for _ in range(sweeps):
            _sweep(H, HE, points, snap)
    return quantizer.snapped(packed, points[order.argsort()].t().contiguous())


def _sweep(H: Tensor, HE: Tensor, points: Tensor, snap: Callable[[int, Tensor], Tensor]) -> None:
    """Move each column of Ŵ in turn, and update H Eᵀ. Both are ``[in, out]``."""
    for start in range(0, len(H), BLOCK):
        stop = min(start + BLOCK, len(H))
        before = points[start:stop].clone()
        for j in range(start, stop):
            points[j] = snap(j, points[j] + HE[j] / H[j, j])
            move = points[j] - before[j - start]
            HE[start:stop].addr_(H[start:stop, j], move, alpha=-1)
        moves = points[start:stop] - before
        for others in (slice(0, start), slice(stop, len(H))):
            add_product(HE[others], H[others, start:stop].neg(), moves)


def factor(quantizer: str, H: Tensor, damping: float) -> tuple[Tensor, float]:
    """U, upper triangular with (H + λI)⁻¹ = Uᵀ U, in H's dtype, and λ.

    The diagonal of H has a mean of about 1.

    If H + λI = R Rᵀ with R upper triangular, then U = R⁻¹. No inverse is factorized. torch gives
    the lower factor, H = L Lᵀ; R is the factor of H with its rows and columns reversed. λ is
    ``damping``, doubled until H + λI can be factorized. From λ = 0.01 on, fp32 gives U to five
    digits or more.

    Raises:
        WeightError: H is not positive semidefinite, so that no λ is enough.
    """
    lam = damping
    with one_thread():
        for _ in range(DOUBLINGS):
            reversed_ = H.flip(0, 1)  # a copy
            reversed_.diagonal().add_(lam)
            L, failed = torch.linalg.cholesky_ex(reversed_)
            if not bool(failed):
                identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
                U: Tensor = torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True)
                return U, lam
            lam *= 2
    raise WeightError(
        f"{quantizer}: expected a positive semidefinite second moment, got one of shape "
        f"{list(H.shape)} that can't be factorized with {lam / 2:g} times its mean on the "
        "diagonal; calibrate again"
    )
