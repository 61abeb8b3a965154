"""The loss of a row against a teacher that names its k most likely tokens.

    loss = (1 - x) (-log p(y)) + x KL(t ‖ p)             x : the weight of the teacher
    KL(t ‖ p) = Σ_v t_v log (t_v / p_v) + T log (T / P)  t : its probabilities, [k]
    ∂ KL / ∂z = p - t̃                                    T, P : of all other tokens, by t and by p

p is the model's prediction, y the label (Hinton et al. 2015, arXiv 1503.02531). The other tokens
are one class in KL. So t̃ is t at the k tokens, and T p / P elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-20
"""The least P: in fp32, all tokens outside of the teacher's can have probability 0."""


@dataclass(frozen=True, slots=True)
class TeacherLoss:
    """A :data:`~modulora_core.training.chunked_loss.RowLoss` of one batch.

    Attributes:
        tokens: the teacher's most likely tokens for each label that is not ignored, int64
            ``[rows, k]``.
        probabilities: their probabilities, ``[rows, k]``.
        weight: x, from 0 to 1.
    """

    tokens: Tensor
    probabilities: Tensor
    weight: float

    def __call__(self, z: Tensor, goals: Tensor, rows: slice, gradient: bool) -> Tensor:
        at_goal = z.gather(1, goals)
        largest = z.amax(1, keepdim=True)
        total = z.sub_(largest).exp_().sum(1, keepdim=True)
        p = z.div_(total)
        loss = (1 - self.weight) * (total.log() + largest - at_goal)
        loss += self.weight * self._divergence(p, rows)
        if gradient:
            p.scatter_add_(1, goals, torch.full_like(total, self.weight - 1))
        return loss

    def _divergence(self, p: Tensor, rows: slice) -> Tensor:
        """KL(t ‖ p) of each row, ``[n, 1]``. It replaces p by ``p - x t̃``."""
        tokens = self.tokens[rows].to(p.device)
        t = self.probabilities[rows].to(p.device, p.dtype)
        T = (1 - t.sum(1, keepdim=True)).clamp_min(0)
        chosen = p.gather(1, tokens)
        P = p.scatter_(1, tokens, 0.0).sum(1, keepdim=True).clamp_min(_SMALLEST)
        p.mul_(1 - self.weight * T / P).scatter_(1, tokens, chosen - self.weight * t)
        known = torch.xlogy(t, t) - torch.xlogy(t, chosen.clamp_min(_SMALLEST))
        return known.sum(1, keepdim=True) + torch.xlogy(T, T) - torch.xlogy(T, P)
