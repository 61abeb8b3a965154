"""LoRA on the fused experts of a mixture.

    y = x Ŵₑᵀ + s (x Aₑᵀ) Bₑᵀ      A : [experts, r, in]      B : [experts, out, r]

The model's own code takes the matrix of an expert out of the stack, for each expert that tokens
reached, and multiplies by it. :class:`LoRAExperts` gives it a matrix with an adapter. So forward
and backward decode reached experts only, one tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modulora_core.autograd import lora_linear
from modulora_core.layers import LoRALayer
from modulora_core.packed_parameters import PackedParameter, PackedStack


@dataclass(frozen=True, slots=True)
class LoRAExpert:
    """The matrix of one expert with its adapter, in the place of a PackedParameter.

    Attributes:
        weight: Ŵₑ, ``[out, in]``; A: ``[r, in]``; B: ``[out, r]``.
        scale: s; dropout: the probability with which the adapter ignores an entry of its input.
    """

    weight: PackedParameter
    A: Tensor
    B: Tensor
    scale: float
    dropout: float

    @property
    def transposed(self) -> bool:
        return self.weight.transposed

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        """``x (Ŵₑ + s B A)ᵀ``, ``[n, out]``."""
        assert not transpose, "a model multiplies by an expert in one direction"
        return lora_linear(
            x, self.weight, None, self.A, self.B, scale=self.scale, dropout=self.dropout
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PackedParameter.__torch_function__(func, types, args, kwargs)


class LoRAExperts(PackedStack, LoRALayer):
    """A stack of experts with named LoRA adapters, as PEFT's ``target_parameters`` make them.

    It shares the packed weights of the stack, so names in a state dict stay. Channel scales are for
    linear layers only.

    Args:
        owner: the module of the stack, whose forward runs the experts.
    """

    def __init__(self, stack: PackedStack, owner: nn.Module) -> None:
        super().__init__(stack, stack.position)
        self.out_features, self.in_features = self.first.layout.shape
        self.stacked = (len(self),)
        self._rows: tuple[tuple[Tensor, ...], tuple[Tensor, ...], float] | None = None
        self._start_without_adapters()
        owner.register_forward_pre_hook(self._split)
        owner.register_forward_hook(self._join, always_call=True)

    def _split(self, *_: object) -> None:
        # the gradients of unbind's results are stacked once; each A[e] would have one of A's size
        A, B, scale = self._adapter()
        self._rows = None if A is None or B is None else (A.unbind(), B.unbind(), scale)

    def _join(self, *_: object) -> None:
        self._rows = None

    def __len__(self) -> int:
        return self.stacked[0] if self.stacked else super().__len__()  # no module of an adapter

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """The matrix of an expert, by an int or a 0-d tensor. Raises IndexError."""
        expert = range(len(self))[index]
        weight = self._modules[str(expert)]
        assert isinstance(weight, PackedParameter)
        A, B, scale = self._rows or self._adapter()
        if A is None or B is None:
            return weight
        return LoRAExpert(weight, A[expert], B[expert], scale, self.active_dropout())
