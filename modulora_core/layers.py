"""The modules that hold packed weights: what stands where a ``nn.Parameter``, a ``nn.Linear`` stood.

    PackedParameter    a packed weight as a module: its tensors are buffers, never cast, moved with the model
    QuantLinear        y = x Ŵᵀ + b
    LoRALinear         a QuantLinear with named LoRA adapters on top
    PackedStack        a fused 3-D expert weight: a list of PackedParameters
    DenseLinear        what stays an ``nn.Linear`` beside them, a head for instance

The model's own forward indexes a stack as it indexed the tensor, and ``F.linear(x, experts[i])``, ``x @ experts[i]`` and
``torch.bmm(x, experts)`` reach the quantizer through torch's ``__torch_function__`` protocol.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from modulora_core import dense_products
from modulora_core.autograd import lora_linear
from modulora_core.errors import AdapterError, ShapeError
from modulora_core.spec import PackedLayout, PackedWeight, Quantizer


class PackedParameter(nn.Module):
    """A packed weight in the place of a parameter.

    Args:
        quantizer: what packed it.
        packed: Ŵ, ``[out, in]``; on the meta device for a skeleton that a loader fills.
        transposed: the model's code sees the weight as ``[in, out]`` (``x @ W`` instead of ``F.linear(x, W)``).
    """

    def __init__(self, quantizer: Quantizer, packed: PackedWeight, *, transposed: bool = False) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.layout: PackedLayout = packed.layout
        self.transposed = transposed
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self._current = packed

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, of the buffers as they are now."""
        # made anew only when a buffer was replaced (moved, loaded): decoding asks for this once a layer and token
        for name, tensor in self._current.tensors.items():
            if self._buffers[name] is not tensor:
                self._current = self.layout.fill(
                    {name: self.get_buffer(name) for name in self.layout.tensors}
                )
                break
        return self._current

    @property
    def shape(self) -> torch.Size:
        """As the model's code sees it."""
        return torch.Size(reversed(self.layout.shape) if self.transposed else self.layout.shape)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``; differentiable in ``x``."""
        return lora_linear(x, self.quantizer, self.packed, transpose=transpose)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.half() and model.to(torch.bfloat16) cast every float buffer; scales keep the dtype they were packed with
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, PackedParameter):
                y = weight.multiply(x, transpose=weight.transposed)
                return y if bias is None else y + bias
        if func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__) and not kwargs:
            x, weight = args
            if isinstance(weight, PackedParameter):
                return weight.multiply(x, transpose=not weight.transposed)
        return NotImplemented

    def extra_repr(self) -> str:
        out_features, in_features = self.layout.shape
        return f"{self.layout.quantizer}, {out_features}x{in_features}, {self.layout.bits_per_weight:.2f} bits per weight"


class PackedStack(nn.ModuleList):
    """The packed matrices of a 3-D parameter, one for each expert; indexed by an int or a 0-d tensor."""

    @property
    def shape(self) -> torch.Size:
        """As the model's code sees it."""
        first = self[0]
        assert isinstance(first, PackedParameter)
        return torch.Size((len(self), *first.shape))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.bmm and not kwargs and isinstance(args[1], PackedStack):
            x, stack = args  # x: [experts, n, rows of each matrix as the model sees it]
            return torch.stack([torch.matmul(part, weight) for part, weight in zip(x, stack, strict=True)])
        return NotImplemented


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


class QuantLinear(nn.Module):
    """A linear layer with a packed, frozen weight: ``y = x Ŵᵀ + b``.

    Args:
        weight: Ŵ, ``[out, in]``.
        bias: ``[out]``, or None.
    """

    def __init__(self, weight: PackedParameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.layout.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ShapeError(f"bias of a QuantLinear: expected [{self.out_features}], got {list(bias.shape)}")
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        # nn.Module's lookup of an attribute is a function in Python, which decoding would call twice a layer and token
        weight: Any = self._modules["weight"]
        return lora_linear(x, weight.quantizer, weight.packed, self._parameters["bias"])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class DenseLinear(nn.Linear):
    """A linear layer that stays dense in a packed model. Frozen, it is multiplied as tiles are (:mod:`modulora_core.dense_products`)."""

    def forward(self, x: Tensor) -> Tensor:
        return dense_products.linear(x, self.weight, self.bias)

    @staticmethod
    def replace_in(model: nn.Module) -> None:
        """Make one of each ``nn.Linear`` of ``model``, which keeps its parameters; subclasses compute what they like and stay."""
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = DenseLinear


class LoRALinear(QuantLinear):
    """A QuantLinear with LoRA adapters (Hu et al. 2021, arXiv 2106.09685): ``y = x Ŵᵀ + b + Σ s (x Aᵀ) Bᵀ``.

    It shares the base's packed weight and bias, so a state dict's names don't change. Several adapters of different
    ranks may be active at once; each has its A ``[r, in]`` and B ``[out, r]`` in ``lora_A[name]`` and ``lora_B[name]``.

    An adapter may have channel scales too, u ``[in]`` and v ``[out]`` in ``input_scale[name]`` and
    ``output_scale[name]``: then diag(v) Ŵ diag(u) stands in the place of Ŵ. Those of several adapters multiply.
    """

    def __init__(self, base: QuantLinear) -> None:
        super().__init__(base.weight, base.bias)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.input_scale = nn.ParameterDict()
        self.output_scale = nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.dropout = 0.0
        self.active: list[str] = []

    def add_adapter(
        self,
        name: str,
        rank: int,
        *,
        alpha: float,
        dropout: float = 0.0,
        channel_scales: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add and activate an adapter: A Kaiming-uniform as in PEFT, B zero, channel scales one, so that the layer's
        output doesn't change.

        Raises:
            AdapterError: the name is taken, the rank isn't positive, or the dropout isn't in [0, 1).
        """
        if name in self.lora_A:
            raise AdapterError(f"adapter {name!r}: there is one of that name already")
        if rank < 1:
            raise AdapterError(f"adapter {name!r}: expected a rank of at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise AdapterError(f"adapter {name!r}: expected a dropout in [0, 1), got {dropout}")
        A = torch.empty(rank, self.in_features, dtype=dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(A.new_zeros(self.out_features, rank))
        if channel_scales:
            self.input_scale[name] = nn.Parameter(A.new_ones(self.in_features))
            self.output_scale[name] = nn.Parameter(A.new_ones(self.out_features))
        self.scale[name] = alpha / rank
        self.dropout = dropout
        self.active.append(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter: ``lora_A``, ``lora_B``, and if it has them ``input_scale``, ``output_scale``."""
        kinds = {"lora_A": self.lora_A, "lora_B": self.lora_B, "input_scale": self.input_scale,
                 "output_scale": self.output_scale}  # fmt: skip
        return {kind: values[name] for kind, values in kinds.items() if name in values}

    def forward(self, x: Tensor) -> Tensor:
        A, B, scale = self._adapter()
        return lora_linear(
            x, self.weight.quantizer, self.weight.packed, self.bias, A, B,
            scale=scale, dropout=self.dropout if self.training else 0.0,
            input_scale=self._channel_scale(self.input_scale), output_scale=self._channel_scale(self.output_scale),
        )  # fmt: skip

    def _adapter(self) -> tuple[Tensor | None, Tensor | None, float]:
        """A, B and s of the active adapters; several are one of the summed rank, with s folded into B."""
        if not self.active:
            return None, None, 1.0
        if len(self.active) == 1:
            name = self.active[0]
            return self.lora_A[name], self.lora_B[name], self.scale[name]
        A = torch.cat([self.lora_A[name] for name in self.active])  # [Σ r, in]
        B = torch.cat([self.lora_B[name] * self.scale[name] for name in self.active], dim=1)  # [out, Σ r]
        return A, B, 1.0

    def _channel_scale(self, of_adapters: nn.ParameterDict) -> Tensor | None:
        """The product over the active adapters that have one."""
        scales: list[Tensor] = [of_adapters[name] for name in self.active if name in of_adapters]
        return functools.reduce(torch.mul, scales) if scales else None

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: {A.shape[0]}" for name, A in self.lora_A.items())
        scaled = f", channel_scales={list(self.input_scale)}" if self.input_scale else ""
        return f"{super().extra_repr()}, adapters={{{ranks}}}{scaled}"
