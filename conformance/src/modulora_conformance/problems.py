"""A layer with everything that can train, and what the core's product of it gives: what levels 4 to 7 compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_conformance import oracle
from modulora_conformance.cases import inputs
from modulora_core.autograd import lora_linear
from modulora_core.spec import PackedWeight, Quantizer

SCALE = 0.5
"""s of every adapter: not 1, so that a forgotten factor shows."""


@dataclass(frozen=True, slots=True)
class Problem:
    """The float operands of a layer, without a graph.

    Attributes:
        x: ``[*leading, in]``; dY: ``[*leading, out]``, the gradient that comes from above; both in one dtype.
        A: ``[r, in]``; B: ``[out, r]``; bias: ``[out]`` or None; fp32, or fp64 where ``x`` is.
    """

    x: Tensor
    dY: Tensor  # noqa: N815 - the paper's
    A: Tensor
    B: Tensor
    bias: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What can train, by name."""
        found = {"x": self.x, "A": self.A, "B": self.B, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: str) -> Problem:
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Problem(
            self.x.to(device), self.dY.to(device), self.A.to(device), self.B.to(device), bias
        )

    def leaves(self, *trained: str) -> dict[str, Tensor]:
        """Copies of :attr:`tensors` as leaves of a graph: those named require a gradient, all where none is named."""
        return {
            name: tensor.clone().requires_grad_(not trained or name in trained)
            for name, tensor in self.tensors.items()
        }

    def exact(self, W: Tensor) -> dict[str, Tensor]:
        """``y`` and the gradients by name for the dense ``W``, all fp64, rows in one dimension."""
        rows = {name: tensor.flatten(0, -2) for name, tensor in (("x", self.x), ("dY", self.dY))}
        y, gradients = oracle.lora(rows["x"], W, self.bias, self.A, self.B, rows["dY"], SCALE)
        return {"y": y, **gradients}

    def error(self, name: str, value: Tensor, W: Tensor) -> float:
        """How far ``y`` or a gradient is from that of the dense ``W``: the norm of the difference, as a share of the norm that it would
        have if no two terms of its sums cancelled, which is what their rounding goes by. Infinite where there is NaN.
        """
        exact, whole = self.exact(W)[name], self._magnitudes().exact(W.abs())[name]
        tiny = torch.finfo(self.x.dtype).smallest_normal  # below it a dtype has fewer digits
        difference = (value.detach().to(torch.float64) - exact).norm() / whole.norm().clamp(
            min=tiny
        )
        return float(difference.nan_to_num(nan=torch.inf))

    def _magnitudes(self) -> Problem:
        bias = None if self.bias is None else self.bias.abs()
        return Problem(self.x.abs(), self.dY.abs(), self.A.abs(), self.B.abs(), bias)


def problem(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (3,),
    rank: int = 2,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """Normal values for a weight of ``shape``; the adapter is as large as the weight of :mod:`modulora_conformance.cases`."""
    out_features, in_features = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        x=inputs(rows, in_features, dtype, seed),
        dY=inputs(rows, out_features, dtype, seed + 1),
        A=inputs((rank,), in_features, wide, seed + 2) / in_features**0.5,
        B=inputs((out_features,), rank, wide, seed + 3) / rank**0.5,
        bias=inputs((), out_features, wide, seed + 4) if bias else None,
    )


def output(
    quantizer: Quantizer, packed: PackedWeight, leaves: dict[str, Tensor], *, dropout: float = 0.0
) -> Tensor:
    """The layer's output, by the core's differentiable product."""
    return lora_linear(
        leaves["x"], quantizer, packed, leaves.get("bias"), leaves["A"], leaves["B"], scale=SCALE, dropout=dropout
    )  # fmt: skip


def gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """What has come to the leaves, by name; x's and y's rows in one dimension."""
    found = {name: leaf.grad for name, leaf in leaves.items()}
    if found["x"] is not None:
        found["x"] = found["x"].flatten(0, -2)
    return found
