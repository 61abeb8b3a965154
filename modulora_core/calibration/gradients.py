"""Sums the gradients in the outputs of one matrix: the sensitivity of the loss to its errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration.moments import SecondMoment
from modulora_core.calibration.observe import ObservedWeight
from modulora_core.errors import WorkError


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The sensitivity of the loss to one matrix.

    Attributes:
        outputs: s, fp32 ``[out]``, a mean over all tokens, in nats per squared unit of the output.
        tokens: w of each sample, fp32 ``[rows]``: of all tokens, or of an expert's tokens, in
            order. Their mean over all samples is 1, or 0 if all gradients are 0.
    """

    outputs: Tensor
    tokens: tuple[Tensor, ...]


class GradientWatch:
    """Sums the squared gradients in the outputs of one matrix, and their products if asked."""

    def __init__(self, observed: ObservedWeight, *, moment: bool) -> None:
        weight = observed.weight
        self._moment = SecondMoment(weight.shape[0], weight.device) if moment else None
        self._outputs = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        self._pieces: list[Tensor] = []  # ‖gₜ‖² of this sample's products, the last product first
        self._tokens: list[Tensor] = []
        observed.watch = self._add

    def _add(self, gradient: Tensor) -> None:
        """``gradient``: ``[..., out]``."""
        g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        squares = g.square()
        norms = squares.sum(1)
        self._outputs += squares.sum(0)
        self._pieces.append(norms.cpu())
        if self._moment is not None:  # ggᵀ / ‖g‖ = (g / √‖g‖) (g / √‖g‖)ᵀ
            self._moment.add(torch.where(norms > 0, norms, 1)[:, None] ** -0.25 * g)

    def next_sample(self) -> None:
        self._tokens.append(torch.cat(self._pieces[::-1]) if self._pieces else torch.empty(0))
        self._pieces.clear()

    def sensitivity(self, name: str, tokens: int, numbers: Sequence[int]) -> Sensitivity:
        """The means over ``tokens`` tokens. Raises WorkError if one is NaN or Inf.

        Args:
            numbers: the numbers of this process's samples among those of all processes.
        """
        distributed.add_up(self._outputs)
        check_finite(self._outputs, f"{name}: its gradient")
        scale = scale_to_mean_one(self._tokens, numbers)
        weights = tuple((each.double() * scale).float() for each in self._tokens)
        return Sensitivity((self._outputs / tokens).cpu(), weights)

    def output_moment(self, name: str) -> Tensor:
        """H_O, fp32 ``[out, out]``, over the tokens of all processes."""
        assert self._moment is not None
        if distributed.world_size() > 1:
            self._moment.add_up()
        return self._moment.mean(name).hessian


def scale_to_mean_one(samples: Sequence[Tensor], numbers: Sequence[int]) -> float:
    """The factor that gives the values of all processes' samples a mean of 1; 0 if all are 0."""
    mine = [(float(each.double().sum()), len(each)) for each in samples]
    sums = distributed.merged(dict(zip(map(str, numbers), mine, strict=True)))
    # fsum rounds once, so the order of the samples changes nothing
    total, count = math.fsum(each for each, _ in sums.values()), sum(n for _, n in sums.values())
    return count / total if total > 0 else 0.0


def check_finite(values: Tensor, subject: str) -> None:
    """Raise WorkError if a value is NaN or Inf."""
    if not bool(torch.isfinite(values).all()):
        raise WorkError(
            f"{subject}: expected finite numbers on the calibration text, got NaN or Inf; the "
            "model overflows on it (try `modulora evaluate` with the same text)"
        )
