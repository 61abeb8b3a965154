"""OPTQ in plain torch, a column at a time, as in the paper: the solver is tested against it.

Symbols of OPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323), section 3:

    W     the weight, [out, in]; each row is quantized by itself, and all rows share H
    H     E[x xᵀ], [in, in]; a row's squared output error is (w − ŵ) H (w − ŵ)ᵀ     equation 1
    λ     damping, added to the diagonal of H                                       section 3.3
    U     upper triangular, (H + λI)⁻¹ = Uᵀ U: all of H that the loop needs         section 3.3
    M     H + λI, for the descent after the loop (descent.py)
    q     a code, 0 … maxq = 2^bits − 1
    s, z  scale and zero point of a group of columns: ŵ = s (q − z)
    e     (w_j − ŵ_j) / U_jj: the error of column j, which later columns
          compensate                                                                equation 2

Everything is computed in fp64 if W is fp64, otherwise in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from modulora_kernels.feedback import factor
from torch import Tensor

from modulora_core.spec import check_hessian
from modulora_optq import SPEC
from modulora_optq.options import Options

SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16, for a group whose range needs less, such as a group of zeros."""

LARGEST_SCALE = 65504.0
"""The largest fp16."""

LARGEST_WEIGHT, SMALLEST_WEIGHT = 65504.0, 2.0**-14
"""A weight's largest magnitude: beyond this range, fp16 scales are too small or too coarse."""

STEPS = 24
"""The number of ranges that a search tries."""

SMALLEST_SHARE = 0.4
"""The tried ranges lie evenly between the whole range and this share of it, which is excluded."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight, Ŵ[o, permutation[k]] = scales[o, g] · (codes[o, k] − zeros[o, g]).

    Stored column k is in group g = k // group size.

    Attributes:
        codes: uint8 ``[out, in]``, 0 … maxq, columns in the stored order.
        scales: fp16 ``[out, groups]``, finite and positive.
        zeros: uint8 ``[out, groups]``, 0 … maxq.
        permutation: int32 ``[in]``: stored column k is column ``permutation[k]`` of the weight.
            None if columns are stored in the weight's own order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    permutation: Tensor | None = None

    def dequantize(self, options: Options) -> Tensor:
        """Ŵ, fp32 ``[out, in]``, columns in the weight's own order."""
        columns = self.codes.shape[1]
        group = torch.arange(columns, device=self.codes.device) // options.group(columns)
        steps = self.codes.to(torch.float32) - self.zeros.to(torch.float32)[:, group]
        W = self.scales.to(torch.float32)[:, group] * steps
        if self.permutation is None:
            return W
        return torch.empty_like(W).index_copy_(1, self.permutation.long(), W)


@dataclass(frozen=True, slots=True)
class Problem:
    """The inputs of quantization, columns in the order in which they are quantized.

    Attributes:
        W: ``[out, in]``, fp64 if the weight is, otherwise fp32; a copy. Dead columns are zero.
        U: ``[in, in]``, upper triangular, in W's dtype.
        M: H + λI, ``[in, in]``, in W's dtype.
        order: int64 ``[in]``: column k here is column ``order[k]`` of the weight.
        group: int64 ``[in]``: the group of column k.
        H_O: None, or the second moment of the gradients in the outputs, ``[out, out]``, in W's
            dtype.
    """

    W: Tensor
    U: Tensor
    M: Tensor
    order: Tensor
    group: Tensor
    H_O: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """1 / U_jj², ``[in]``: the cost of an error of column j after compensation (equation 2)."""
        return self.U.diagonal() ** -2

    def solution(self, q: Tensor, s: Tensor, z: Tensor, options: Options) -> Solution:
        """Put codes into the stored order, and all three into their stored dtypes."""
        permutation = None
        if options.permutes(q.shape[1]):
            permutation = self.order.to(torch.int32)
        else:
            q = torch.empty_like(q).index_copy_(1, self.order, q)
        return Solution(q.to(torch.uint8), s.to(torch.float16), z.to(torch.uint8), permutation)


def prepare(
    weight: Tensor, hessian: Tensor, options: Options, output_hessian: Tensor | None = None
) -> Problem:
    """Order the columns, zero the dead ones, and factorize H.

    Args:
        weight: ``[out, in]``, any float dtype and strides. It is not changed.
        hessian: ``[in, in]``, symmetric, positive semidefinite. Its magnitude has no effect.
        options: bits, groups, order, damping.
        output_hessian: None, or H_O, ``[out, out]``, symmetric, positive semidefinite.

    Raises:
        ShapeError: a second moment does not fit ``weight``.
        WeightError: NaN or Inf in one of them, or one is no second moment.
    """
    check_hessian(SPEC.name, weight, hessian, output_hessian)
    columns = weight.shape[1]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    W = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    H = hessian.detach().to(W.device, torch.promote_types(hessian.dtype, dtype))
    diagonal = H.diagonal().clone()
    dead = diagonal == 0  # inputs that were always zero: their weights had no effect
    W[:, dead] = 0
    H = (H / (1.0 if dead.all() else float(diagonal[~dead].mean(dtype=torch.float64)))).to(dtype)
    H[dead, dead] = 1
    order = torch.arange(columns, device=W.device)
    group = order // options.group(columns)
    if options.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        W, H = W[:, order].contiguous(), H[order[:, None], order]
        group = group[order] if options.static_groups else group
    H_O = None if output_hessian is None else output_hessian.detach().to(W)
    U, lam = factor(SPEC.name, H, options.damping)
    H.diagonal().add_(lam)
    return Problem(W, U, H, order, group, H_O)


def solve(weight: Tensor, hessian: Tensor, options: Options) -> Solution:
    """Quantize ``weight``, ``[out, in]``: algorithm 1 with blocks of one column.

    See :func:`prepare` for arguments and errors.
    """
    problem = prepare(weight, hessian, options)
    W, U, group, loss = problem.W, problem.U, problem.group, problem.loss
    size, groups = options.group(W.shape[1]), options.groups(W.shape[1])
    q = torch.empty_like(W)
    s, z = W.new_empty(len(W), groups), W.new_empty(len(W), groups)
    if options.static_groups:
        for g in range(groups):
            s[:, g], z[:, g] = grid(W[:, group == g], loss[group == g], options)
    for j in range(W.shape[1]):
        g = int(group[j])
        if not options.static_groups and j % size == 0:  # columns as earlier ones left them
            s[:, g], z[:, g] = grid(W[:, j : j + size], loss[j : j + size], options)
        q[:, j] = quantize(W[:, j], s[:, g], z[:, g], options)
        e = (W[:, j] - s[:, g] * (q[:, j] - z[:, g])) / U[j, j]
        W[:, j:] -= torch.outer(e, U[j, j:])  # equation 3
    return problem.solution(q, s, z, options)


def quantize(w: Tensor, s: Tensor, z: Tensor, options: Options) -> Tensor:
    """The codes nearest to ``w``; a tie takes the even step from zero."""
    return (torch.round(w / s) + z).clamp(0, options.maxq)


def grid(W: Tensor, loss: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point for each row of a group, ``[out, columns]`` to twice ``[out]``.

    The candidate with the least Σ_j loss_j (w_j − ŵ_j)², the first of equals. ``loss``,
    ``[columns]``, is 1 / U_jj² (equation 2).
    """
    best_s, best_z = next(candidates(W, options))  # kept if all errors overflow
    least = W.new_full((len(W),), torch.inf)
    for s, z in candidates(W, options):
        W_hat = s[:, None] * (quantize(W, s[:, None], z[:, None], options) - z[:, None])
        error = ((W - W_hat).square() * loss).sum(dim=1)
        better = error < least
        least = torch.where(better, error, least)
        best_s, best_z = torch.where(better, s, best_s), torch.where(better, z, best_z)
    return best_s, best_z


def shares(options: Options) -> list[float]:
    """The shares of a group's range to try, the whole range first."""
    if not options.range_search:
        return [1.0]
    return [1 - (1 - SMALLEST_SHARE) * i / STEPS for i in range(STEPS)]


def candidates(W: Tensor, options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales, which are fp16 numbers, and zero points to choose from, ``[out]`` each.

    A range includes zero: min(w, 0) to max(w, 0), or −max|w| to max|w| when symmetric. A search
    also tries the zero point above and the one below, which move a shrunken range.
    """
    low, high = W.amin(dim=1).clamp(max=0), W.amax(dim=1).clamp(min=0)
    if options.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    for share in shares(options):
        s = (high * share - low * share) / options.maxq
        s = s.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).to(W.dtype)
        if options.symmetric:
            yield s, torch.full_like(s, options.middle)
            continue
        z = torch.round(-(low * share) / s)
        for shift in (0, -1, 1) if options.range_search else (0,):
            yield s, (z + shift).clamp(0, options.maxq)
