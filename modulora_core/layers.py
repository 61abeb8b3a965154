"""Linear layers of packed weights, with and without LoRA adapters.

    QuantLinear   y = x Ŵᵀ + b
    TiedHead      an output head that shares the packed table of the embedding
    LoRALayer     named LoRA adapters of a layer
    ChannelScales two vectors that scale the rows and the columns of a packed weight
    LoRALinear    a QuantLinear with adapters, which may have such vectors

For PEFT a QuantLinear is an ``nn.Linear``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.arguments import checked
from modulora_core.autograd import lora_linear
from modulora_core.errors import AdapterError, ShapeError
from modulora_core.packed_parameters import HeadWeight, PackedParameter, PackedTable


class QuantLinear(nn.Linear):
    """A linear layer with a packed, frozen weight: ``y = x Ŵᵀ + b``.

    Args:
        weight: Ŵ, ``[out, in]``.
        bias: ``[out]``, or None.

    Attributes:
        is_head: it is an output head, whose ``weight`` is a tensor from which TRL reads rows.
    """

    is_head = False

    @checked
    def __init__(self, weight: PackedParameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a dense weight
        self.out_features, self.in_features = weight.layout.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ShapeError(
                f"bias of a QuantLinear: expected [{self.out_features}], got {list(bias.shape)}"
            )
        self._modules["weight"] = weight  # its name in files
        self.bias: nn.Parameter | None  # type: ignore[assignment]
        self.register_parameter("bias", bias)

    @property
    def packed_weight(self) -> PackedParameter:
        """Ŵ."""
        return self._modules["weight"]  # type: ignore[return-value]

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """Ŵ, as a tensor if ``is_head``."""
        return HeadWeight(self.packed_weight) if self.is_head else self.packed_weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed_weight.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}"


class TiedHead(QuantLinear):
    """The output head of a model whose input embedding is the same packed table.

    It refers to the table and does not own it, so the table is stored, moved and counted once.
    """

    is_head = True

    def __init__(self, table: PackedTable, bias: nn.Parameter | None = None) -> None:
        super().__init__(table, bias)
        self.__dict__["table"] = self._modules.pop("weight")  # no submodule of this one

    @property
    def packed_weight(self) -> PackedParameter:
        return self.__dict__["table"]  # type: ignore[no-any-return]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The table's too, so that they refuse to train when PEFT asks each parameter."""
        return chain(super().parameters(recurse), self.packed_weight.parameters(recurse))


class LoRALayer(nn.Module):
    """A layer with named LoRA adapters (arXiv 2106.09685). Several may be active at once.

    Each has A ``[r, in]`` and B ``[out, r]`` in ``lora_A[name]`` and ``lora_B[name]``, s in
    ``scale[name]``, and its dropout. Active adapters that train need equal dropouts. On
    ``stacked == (experts,)`` matrices, A is ``[experts, r, in]`` and B ``[experts, out, r]``.
    """

    in_features: int
    out_features: int
    stacked: tuple[int, ...] = ()

    def _start_without_adapters(self) -> None:
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.input_scale, self.output_scale = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        # modules, so that libraries can turn them off
        self.dropout: dict[str, nn.Dropout] = nn.ModuleDict()  # type: ignore[assignment]
        self.active: list[str] = []

    def add_adapter(
        self, name: str, rank: int, *, alpha: float, dropout: float = 0.0,
        channel_scales: bool = False, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """Add and activate an adapter that does not change the output yet.

        A is Kaiming-uniform as in PEFT, B is zero, channel scales are one.

        Raises:
            AdapterError: the name is taken, the rank is not positive, or the dropout is not in [0,
                1).
        """
        if name in self.lora_A:
            raise AdapterError(f"adapter {name!r}: there is one of that name already")
        if rank < 1:
            raise AdapterError(f"adapter {name!r}: expected a rank of at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise AdapterError(f"adapter {name!r}: expected a dropout in [0, 1), got {dropout}")
        device = next(m.device for m in self.modules() if isinstance(m, PackedParameter))
        A = torch.empty(*self.stacked, rank, self.in_features, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(A.view(-1, self.in_features), a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(A.new_zeros(*self.stacked, self.out_features, rank))
        if channel_scales:
            self.input_scale[name] = nn.Parameter(A.new_ones(self.in_features))
            self.output_scale[name] = nn.Parameter(A.new_ones(self.out_features))
        self.scale[name] = alpha / rank
        self.dropout[name] = nn.Dropout(dropout)
        self.active.append(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter: ``lora_A``, ``lora_B``, and ``input_scale``,
        ``output_scale`` if it has them."""
        kinds = {"lora_A": self.lora_A, "lora_B": self.lora_B, "input_scale": self.input_scale,
                 "output_scale": self.output_scale}  # fmt: skip
        return {kind: values[name] for kind, values in kinds.items() if name in values}

    def active_dropout(self) -> float:
        """The probability of the active adapters, which read one input; 0 in evaluation.

        Raises AdapterError: they have different ones.
        """
        if not self.training:
            return 0.0
        found = {name: self.dropout[name].p for name in self.active}
        if len({*found.values()}) > 1:
            each = " and ".join(f"{dropout:g} of {name!r}" for name, dropout in found.items())
            raise AdapterError(
                f"active adapters of a layer: expected one dropout in training, got {each}; "
                "add the new adapter with the dropout of the other one"
            )
        return next(iter(found.values()), 0.0)

    def _adapter(self) -> tuple[Tensor | None, Tensor | None, float]:
        """A, B and s of the active adapters. Several adapters become one: ranks add up, and s is
        folded into B."""
        if not self.active:
            return None, None, 1.0
        if len(self.active) == 1:
            name = self.active[0]
            return self.lora_A[name], self.lora_B[name], self.scale[name]
        A = torch.cat([self.lora_A[name] for name in self.active], dim=-2)  # [Σ r, in]
        scaled = [self.lora_B[name] * self.scale[name] for name in self.active]
        return A, torch.cat(scaled, dim=-1), 1.0  # B: [out, Σ r]


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """Two vectors u and v that replace Ŵ by diag(v) Ŵ diag(u).

    Attributes:
        input: u, ``[in]``.
        output: v, ``[out]``.

    Raises ShapeError: one of them is not a vector.
    """

    input: Tensor
    output: Tensor

    def __post_init__(self) -> None:
        if self.input.dim() != 1 or self.output.dim() != 1:
            shapes = f"{list(self.input.shape)} and {list(self.output.shape)}"
            raise ShapeError(f"channel scales: expected two vectors, got {shapes}")

    def of_rows(self, start: int, stop: int, W: Tensor) -> Tensor:
        """Scale ``W``, rows ``[start, stop)`` of Ŵ, ``[stop - start, in]``; in its dtype."""
        return W * self.output[start:stop, None].to(W.dtype) * self.input.to(W.dtype)


class LoRALinear(QuantLinear, LoRALayer):
    """A QuantLinear with LoRA adapters: ``y = x Ŵᵀ + b + Σ s (x Aᵀ) Bᵀ``.

    It shares the base's packed weight and bias, so names in a state dict stay.

    An adapter may have channel scales u ``[in]`` and v ``[out]`` in ``input_scale[name]`` and
    ``output_scale[name]``: they replace Ŵ by diag(v) Ŵ diag(u). The scales of several adapters
    multiply."""

    @checked
    def __init__(self, base: QuantLinear) -> None:
        super().__init__(base.packed_weight, base.bias)
        self._start_without_adapters()

    def forward(self, x: Tensor) -> Tensor:
        A, B, scale = self._adapter()
        return lora_linear(
            x, self.packed_weight, self.bias, A, B, scale=scale,
            dropout=self.active_dropout(),
            input_scale=self._channel_scale(self.input_scale),
            output_scale=self._channel_scale(self.output_scale),
        )  # fmt: skip

    def _channel_scale(self, of_adapters: nn.ParameterDict) -> Tensor | None:
        """The product of the active adapters' scales; None if no adapter has any."""
        scales: list[Tensor] = [of_adapters[name] for name in self.active if name in of_adapters]
        return functools.reduce(torch.mul, scales) if scales else None

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: {A.shape[0]}" for name, A in self.lora_A.items())
        scaled = f", channel_scales={list(self.input_scale)}" if self.input_scale else ""
        return f"{super().extra_repr()}, adapters={{{ranks}}}{scaled}"
