"""Makes an adapted layer's operands, its output by the core, and its exact gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_conformance.cases import inputs
from modulora_core.autograd import FrozenWeight, lora_linear
from modulora_core.spec import PackedWeight, Quantizer

SCALE = 0.5
"""s of every adapter: not 1, so that a missing factor shows."""


@dataclass(frozen=True, slots=True)
class Problem:
    """The float operands of a layer, without a graph.

    Attributes:
        operands: ``x: [*leading, in]``, ``A: [r, in]``, ``B: [out, r]``, perhaps ``bias: [out]``.
            A, B and the bias are fp32, or fp64 if ``x`` is.
        dY: ``[*leading, out]``, the gradient of the output, in ``x``'s dtype.
    """

    operands: dict[str, Tensor]
    dY: Tensor  # noqa: N815  # the paper's symbol

    @property
    def x(self) -> Tensor:
        return self.operands["x"]

    def to(self, device: str) -> Problem:
        return Problem(
            {name: t.to(device) for name, t in self.operands.items()}, self.dY.to(device)
        )

    def leaves(self, *trained: str) -> dict[str, Tensor]:
        """Copies of the operands. The named ones require a gradient; all if none is named."""
        return {
            name: tensor.clone().requires_grad_(not trained or name in trained)
            for name, tensor in self.operands.items()
        }

    def exact(self, W: Tensor) -> dict[str, Tensor]:
        """``y`` and the gradients by name for the dense ``W``, all fp64, by torch's autograd."""
        x, A, B, *bias = leaves = [
            t.detach().to(torch.float64).requires_grad_() for t in self.operands.values()
        ]
        y = x @ W.T + SCALE * (x @ A.T) @ B.T + sum(bias)
        gradients = torch.autograd.grad(y, leaves, self.dY.to(torch.float64))
        return {"y": y.detach()} | dict(zip(self.operands, gradients, strict=True))

    def error(self, name: str, value: Tensor, W: Tensor) -> float:
        """How far ``y`` or a gradient is from its exact value for the dense ``W``; infinite for
        NaN.

        The norm of the difference, as a share of the norm without cancellation: rounding is
        proportional to the magnitudes of the terms.
        """
        magnitudes = {name: t.abs() for name, t in self.operands.items()}
        whole = Problem(magnitudes, self.dY.abs()).exact(W.abs())[name].norm()
        tiny = torch.finfo(self.x.dtype).smallest_normal  # a dtype has fewer digits below
        difference = (value.detach().to(torch.float64) - self.exact(W)[name]).norm()
        return float((difference / whole.clamp(min=tiny)).nan_to_num(nan=torch.inf))


def problem(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (3,),
    rank: int = 2,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """Normal values for a weight of ``shape``."""
    out_features, in_features = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    operands = {
        "x": inputs(rows, in_features, dtype, seed),
        "A": inputs((rank,), in_features, wide, seed + 2) / in_features**0.5,
        "B": inputs((out_features,), rank, wide, seed + 3) / rank**0.5,
    }
    if bias:
        operands["bias"] = inputs((), out_features, wide, seed + 4)
    return Problem(operands, inputs(rows, out_features, dtype, seed + 1))


def output(
    quantizer: Quantizer, packed: PackedWeight, leaves: dict[str, Tensor], *, dropout: float = 0.0
) -> Tensor:
    """The layer's output, by the core."""
    x, A, B, bias = (leaves.get(name) for name in ("x", "A", "B", "bias"))
    assert x is not None
    return lora_linear(x, FrozenWeight(quantizer, packed), bias, A, B, scale=SCALE, dropout=dropout)
