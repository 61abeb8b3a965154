"""Modules that hold packed weights.

    PackedParameter   a packed weight as a module: its tensors are frozen, moved but never cast
    QuantLinear       y = x Ŵᵀ + b
    LoRALayer         named LoRA adapters of a layer
    LoRALinear        a QuantLinear with them
    PackedStack       fused experts, [experts, out, in]: a list of PackedParameters

The model's own code uses a packed weight like the tensor that it replaces. ``F.linear(x, W)``,
``x @ W`` and ``torch.bmm(x, experts)`` reach the quantizer through torch's ``__torch_function__``
protocol. For PEFT a QuantLinear is an ``nn.Linear``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modulora_core.arguments import checked
from modulora_core.autograd import lora_linear, new_number, packed_product
from modulora_core.errors import AdapterError, ShapeError
from modulora_core.frozen import FrozenParameter, PEFTParameter
from modulora_core.spec import PackedWeight, Quantizer

_HALVES = (torch.float16, torch.bfloat16)
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class PackedParameter(PEFTParameter):
    """A packed weight in the place of a parameter.

    Its tensors are parameters without a gradient, since DDP broadcasts buffers at each forward and
    FSDP2 shards parameters alone. A 0-d tensor, which FSDP2 cannot shard, is a buffer.

    Args:
        quantizer: the quantizer that packed it.
        packed: Ŵ, ``[out, in]``; on the meta device for a skeleton that a loader fills.
        transposed: the model's code sees the weight as ``[in, out]`` and computes ``x @ W``.
        dtype: the dtype of the dense weight in its place, to which some models cast activations.
            ``model.to(dtype)`` changes it as it would change a dense weight.
    """

    def __init__(
        self, quantizer: Quantizer, packed: PackedWeight, *, transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype = dtype
        self.quantizer = quantizer
        self.layout = packed.layout
        self.transposed = transposed
        self.number = new_number(self)
        self._dtypes = {name: tensor.dtype for name, tensor in packed.tensors.items()}
        self._packed: PackedWeight | None = None
        for name, tensor in packed.tensors.items():
            if tensor.dim():
                self.register_parameter(name, FrozenParameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number, self._packed = new_number(self), None  # it is a deep copy
        self._freeze()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):  # FSDP2 puts a shard in: nothing holds the whole tensor
            self._packed = None
            self._freeze()

    def _freeze(self) -> None:
        """Make frozen parameters of those that a loader, torch or pickle made."""
        for parameter in self._parameters.values():
            if type(parameter) is nn.Parameter:
                parameter.__class__ = FrozenParameter

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, made of the tensors as they are now.

        Cached as long as the tensors are the same, for decoding reads it once a layer and token.
        """
        tensors = {name: self._tensor(name) for name in self._dtypes}
        known = self._packed
        if known is None or any(known.tensors[n] is not t for n, t in tensors.items()):
            known = self._packed = self.layout.fill(tensors)
        return known

    def _tensor(self, name: str) -> Tensor:
        tensor = self._parameters[name] if name in self._parameters else self._buffers[name]
        assert tensor is not None
        if tensor.dtype is torch.float32 and self._dtypes[name] in _HALVES:
            # PEFT's prepare_model_for_kbit_training widens 16-bit parameters; narrowing is exact
            tensor.data = tensor.data.to(self._dtypes[name])
        return tensor

    @property
    def shape(self) -> torch.Size:
        """The shape that the model's code sees."""
        return torch.Size(reversed(self.layout.shape) if self.transposed else self.layout.shape)

    @property
    def device(self) -> torch.device:
        return self._tensor(next(iter(self._dtypes))).device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole Ŵ, in the orientation that the model's code sees."""
        out = self.layout.shape[0]
        tile = self.quantizer.dequantize_tile(self.packed, (0, out), dtype)
        return tile.t().contiguous() if self.transposed else tile

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``; differentiable in ``x``."""
        return packed_product(x, self, transpose)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype

        # model.half() casts every float buffer; scales keep the dtype that they were packed with
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        self._freeze()
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **(kwargs or {}))
            if hasattr(weight, "multiply"):  # a PackedParameter, or one with an adapter
                y = weight.multiply(x, transpose=weight.transposed)
                return y if bias is None else y + bias
        if func in _PRODUCTS and not kwargs:
            x, weight = args
            if hasattr(weight, "multiply"):
                return weight.multiply(x, transpose=not weight.transposed)
        return NotImplemented

    def extra_repr(self) -> str:
        out_features, in_features = self.layout.shape
        bits = f"{self.layout.bits_per_weight:.2f} bits per weight"
        return f"{self.layout.quantizer}, {out_features}x{in_features}, {bits}"


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


class PackedStack(nn.ModuleList):
    """The packed matrices of a 3-D parameter, indexed by an int or a 0-d tensor.

    Args:
        matrices: a PackedParameter for each expert, of one shape.
        position: the position of the dense parameter among the parameters of its module.
    """

    def __init__(self, matrices: Iterable[nn.Module], position: int = 0) -> None:
        super().__init__(matrices)
        self.position = position

    @property
    def first(self) -> PackedParameter:
        """The matrix of expert 0, without an adapter. All have its shape."""
        return self.get_submodule("0")  # type: ignore[return-value]

    @property
    def shape(self) -> torch.Size:
        """The shape that the model's code sees."""
        return torch.Size((len(self), *self.first.shape))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bmm and not kwargs and isinstance(args[1], PackedStack):
            x, stack = args  # x: [experts, n, rows of each matrix as the model sees it]
            return torch.stack([part @ stack[i] for i, part in enumerate(x)])
        return NotImplemented


class QuantLinear(nn.Linear):
    """A linear layer with a packed, frozen weight: ``y = x Ŵᵀ + b``.

    Args:
        weight: Ŵ, ``[out, in]``.
        bias: ``[out]``, or None.
    """

    @checked
    def __init__(self, weight: PackedParameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a dense weight
        self.out_features, self.in_features = weight.layout.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ShapeError(
                f"bias of a QuantLinear: expected [{self.out_features}], got {list(bias.shape)}"
            )
        self.weight: PackedParameter = weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None  # type: ignore[assignment]
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}"


class LoRALayer(nn.Module):
    """A layer with named LoRA adapters (arXiv 2106.09685). Several may be active at once.

    Each has A ``[r, in]`` and B ``[out, r]`` in ``lora_A[name]`` and ``lora_B[name]``. On
    ``stacked == (experts,)`` matrices, A is ``[experts, r, in]`` and B ``[experts, out, r]``.
    """

    in_features: int
    out_features: int
    stacked: tuple[int, ...] = ()

    def _without_adapters(self) -> None:
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.input_scale, self.output_scale = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.dropout = nn.Dropout(0.0)  # a module, so that libraries can turn it off
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
        self.dropout.p = dropout
        self.active.append(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter: ``lora_A``, ``lora_B``, and ``input_scale``,
        ``output_scale`` if it has them."""
        kinds = {"lora_A": self.lora_A, "lora_B": self.lora_B, "input_scale": self.input_scale,
                 "output_scale": self.output_scale}  # fmt: skip
        return {kind: values[name] for kind, values in kinds.items() if name in values}

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


class LoRALinear(QuantLinear, LoRALayer):
    """A QuantLinear with LoRA adapters: ``y = x Ŵᵀ + b + Σ s (x Aᵀ) Bᵀ``.

    It shares the base's packed weight and bias, so names in a state dict stay.

    An adapter may have channel scales u ``[in]`` and v ``[out]`` in ``input_scale[name]`` and
    ``output_scale[name]``: they replace Ŵ by diag(v) Ŵ diag(u). The scales of several adapters
    multiply."""

    @checked
    def __init__(self, base: QuantLinear) -> None:
        super().__init__(base.weight, base.bias)
        self._without_adapters()

    def forward(self, x: Tensor) -> Tensor:
        A, B, scale = self._adapter()
        return lora_linear(
            x, self.weight, self.bias, A, B, scale=scale,
            dropout=self.dropout.p if self.training else 0.0,
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
