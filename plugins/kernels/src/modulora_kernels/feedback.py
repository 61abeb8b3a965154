"""Rounds a weight to the grid of a packed one, block by block, with feedback of the errors.

Symbols of OPTQ (Frantar et al. 2022, arXiv 2210.17323), section 3:

    V     the weight to round, [out, in];   Ŵ   its rounding;   E = V − Ŵ
    H     E[x xᵀ], [in, in]; the outputs' squared error is tr(E H Eᵀ)               equation 1
    λ     damping, added to the diagonal of H
    U     upper triangular, (H + λI)⁻¹ = Uᵀ U

A block is the columns whose weights have one code: one column, or eight or sixteen of a lattice or
a trellis. Blocks are rounded in the order of H's diagonal. Later ones make up for earlier errors.
Sweeps of coordinate descent follow: each block moves to the points near its best place while all
other columns stay, Ŵ_k + (E H)_k H_kk⁻¹. With single columns no move makes a row's error larger.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from modulora_core.dense_products import add_product, one_thread, product
from modulora_core.errors import WeightError
from modulora_core.spec import PackedWeight, Quantizer, check_hessian
from modulora_kernels.incoherence import diagonal_blocks

BLOCK = 128
"""Columns between two updates of all other columns, as in the paper."""

DOUBLINGS = 16
"""How often λ is doubled at most."""

Snap = Callable[[int, Tensor], Tensor]
"""``snap(j, V)``: the points nearest to V, ``[out, block]``, in columns from j on."""


class RoundsBlocks(Quantizer):
    """Rounds with feedback itself: weights of several columns share a code."""

    @abstractmethod
    def rounded(
        self, packed: PackedWeight, V: Tensor, hessian: Tensor, *, damping: float, sweeps: int
    ) -> PackedWeight:
        """As :func:`rounded_to_grid`. Scales and signs stay, and V = Ŵ changes no byte."""


def merges(quantizer: Quantizer) -> bool:
    """Whether :func:`rounded_to_grid` can move the codes of its packed weights."""
    return quantizer.snaps or isinstance(quantizer, RoundsBlocks)


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
        quantizer: of ``packed``; it :func:`merges`.
        V: fp32 ``[out, in]``.
        hessian: H, ``[in, in]``, symmetric, positive semidefinite. Its magnitude has no effect.
        damping: λ, as a share of the mean of H's diagonal.
        sweeps: of coordinate descent over all columns, after the feedback.

    Raises:
        ShapeError, WeightError: H does not fit, is not finite, or is no second moment.
    """
    check_hessian(quantizer.spec.name, V, hessian)
    if isinstance(quantizer, RoundsBlocks):
        return quantizer.rounded(packed, V, hessian, damping=damping, sweeps=sweeps)

    def snap(j: int, values: Tensor) -> Tensor:
        return quantizer.snap(packed, (0, len(V)), (j, j + 1), values)

    points = rounded(quantizer.spec.name, V, hessian, snap, damping=damping, sweeps=sweeps)
    return quantizer.snapped(packed, points)


def rounded(
    quantizer: str,
    V: Tensor,
    hessian: Tensor,
    snap: Snap,
    *,
    block: int = 1,
    damping: float,
    sweeps: int,
) -> Tensor:
    """Ŵ, fp32 ``[out, in]``, of the points that ``snap`` gives.

    Args:
        quantizer: its name, for messages.
        snap: it is asked for each block once, and once more in each sweep.
        block: the columns of a block, a divisor of V's columns and of :data:`BLOCK`.
        V, hessian, damping, sweeps: as in :func:`rounded_to_grid`.

    Raises:
        WeightError: H is no second moment.
    """
    diagonal = hessian.diagonal()
    alive = diagonal > 0  # other inputs were always zero: their weights had no effect
    H = hessian.to(V) / (float(diagonal[alive].mean()) if bool(alive.any()) else 1.0)
    H.diagonal()[~alive] = 1
    columns = torch.arange(len(H), device=V.device).view(-1, block)
    columns = columns[diagonal[columns].sum(1).argsort(descending=True, stable=True)]
    first, order = columns[:, 0].tolist(), columns.flatten()
    H = H[order[:, None], order]
    U, lam = factor(quantizer, H, damping)
    U = _of_unit_blocks(U, block)

    def snap_at(j: int, values: Tensor) -> Tensor:
        return snap(first[j // block], values.t()).t()

    W = V.t()[order].contiguous()  # [in, out]: a column is one run of memory
    points = torch.empty_like(W)
    for start in range(0, len(W), BLOCK):
        stop = min(start + BLOCK, len(W))
        E = W.new_empty(stop - start, len(V))
        for j in range(start, stop, block):
            here, errors = slice(j, j + block), E[j - start : j - start + block]
            points[here] = snap_at(j, W[here])
            torch.sub(W[here], points[here], out=errors)
            W[j + block : stop].addmm_(U[here, j + block : stop].t(), errors, alpha=-1)
        add_product(W[stop:], U[start:stop, stop:].t().neg(), E)
    if sweeps:
        H.diagonal().add_(lam)
        inverses = torch.linalg.inv(diagonal_blocks(H, block))
        HE = product(H, V.t()[order] - points)
        for _ in range(sweeps):
            _sweep(H, inverses, HE, points, snap_at)
    return points[order.argsort()].t().contiguous()


def _sweep(H: Tensor, inverses: Tensor, HE: Tensor, points: Tensor, snap: Snap) -> None:
    """Move each block of Ŵ in turn, and update H Eᵀ. Both are ``[in, out]``.

    ``inverses`` are H_kk⁻¹, ``[blocks, block, block]``."""
    block = inverses.shape[1]
    for start in range(0, len(H), BLOCK):
        stop = min(start + BLOCK, len(H))
        before = points[start:stop].clone()
        for j in range(start, stop, block):
            here = slice(j, j + block)
            points[here] = snap(j, points[here] + inverses[j // block] @ HE[here])
            moves = points[here] - before[j - start : j - start + block]
            HE[start:stop].addmm_(H[start:stop, here], moves, alpha=-1)
        moves = points[start:stop] - before
        for others in (slice(0, start), slice(stop, len(H))):
            add_product(HE[others], H[others, start:stop].neg(), moves)


def _of_unit_blocks(U: Tensor, block: int) -> Tensor:
    """diag(U_kk)⁻¹ U: the feedback of a block's errors, with the identity in diagonal blocks."""
    rows = U.unflatten(0, (-1, block))
    unit: Tensor = torch.linalg.solve_triangular(diagonal_blocks(U, block), rows, upper=True)
    return unit.flatten(0, 1)


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
