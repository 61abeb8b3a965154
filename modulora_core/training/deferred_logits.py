"""Logits that are computed when they are read: a few rows at a time, or whole.

    z = f(h Wᵀ + b)      h : [..., hidden]   W : [vocabulary, hidden]   z : [..., vocabulary]

A causal language model's forward ends with its head, often a pointwise function f (a scale, a soft
cap), and the loss. Inside :func:`deferred_head` the head returns :class:`DeferredLogits`, which
keep h and record f. The model's own forward runs unchanged, with everything else that it computes,
such as an auxiliary loss of experts. The chunked loss then reads a few rows at a time
(:mod:`modulora_core.training.chunked_loss`). Other code gets z whole, with its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from modulora_core.layers import QuantLinear

_POINTWISE = frozenset(
    ["mul", "div", "true_divide", "tanh", "float", "double", "to", "contiguous", "clamp", "add",
     "sub", "neg"]
)  # fmt: skip
"""torch's functions that keep rows apart, if no other operand is a tensor.

Any other function gets z whole: a missing name costs memory and never changes a result.
"""

_FACTS = frozenset(
    ["size", "dim", "numel", "is_floating_point", "__len__", "shape", "dtype", "device", "ndim",
     "requires_grad", "layout", "is_cuda"]
)  # fmt: skip
"""Methods and properties of a tensor that need no values."""


@dataclass(frozen=True, slots=True)
class Head:
    """z = f(h Wᵀ + b) as a function of h, row by row.

    Attributes:
        linear: the layer's forward, ``[..., hidden]`` to ``[..., vocabulary]``.
        parameters: its parameters that train.
        steps: f, the pointwise functions after the layer.
    """

    linear: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        for step in self.steps:
            logits = step(logits)
        return logits


class DeferredLogits(Tensor):
    """``head(hidden)`` as a tensor with shape, dtype and device, but without storage.

    Args:
        hidden: h, ``[..., hidden]``.
        head: the head with f.
        empty: ``head`` of no rows, ``[..., 0, vocabulary]``.
    """

    hidden: Tensor
    head: Head
    empty: Tensor
    _whole: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, head: Head, empty: Tensor) -> DeferredLogits:
        shape = (*hidden.shape[:-1], empty.shape[-1])
        logits: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=empty.dtype, device=empty.device
        )
        logits.hidden, logits.head, logits.empty, logits._whole = hidden, head, empty, None
        return logits

    @property
    def is_whole(self) -> bool:
        """Whether all rows were computed. They may have been changed in place since."""
        return self._whole is not None

    def whole(self) -> Tensor:
        """An ordinary tensor of this shape, differentiable in ``hidden`` and the parameters."""
        if self._whole is None:
            self._whole = self.head(self.hidden)
        return self._whole

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and not first.is_whole:
            name, others = _name(func), args[1:]
            if name in _FACTS:
                return super().__torch_function__(func, types, args, kwargs)
            if name in _POINTWISE and not any(
                isinstance(operand, Tensor) for operand in (*others, *kwargs.values())
            ):

                def step(logits: Tensor) -> Tensor:
                    return func(logits, *others, **kwargs)  # type: ignore[no-any-return]

                head = replace(first.head, steps=(*first.head.steps, step))
                return DeferredLogits(first.hidden, head, step(first.empty))
        return func(*_whole(args), **_whole(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func}: deferred logits have no values")


def _name(func: Callable[..., Any]) -> str:
    getter = getattr(func, "__name__", "") == "__get__"  # of a property
    return getattr(func.__self__ if getter else func, "__name__", "")  # type: ignore[attr-defined]


def _whole(value: Any) -> Any:
    """``value`` with ordinary tensors in the place of deferred ones."""
    if isinstance(value, DeferredLogits):
        return value.whole()
    if isinstance(value, list | tuple):
        return type(value)(map(_whole, value))
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


@contextmanager
def deferred_head(head: nn.Module | None) -> Iterator[None]:
    """Let ``head`` return :class:`DeferredLogits` in this block, by forward hooks.

    A head that is no linear layer works as usual. So does one with hooks, which want its output.
    FSDP2's hooks do not: they gather the head's shards, which then stay whole until the backward.
    """
    if not isinstance(head, nn.Linear | QuantLinear):
        yield
        return
    if isinstance(head, FSDPModule):
        head.set_reshard_after_forward(False, recurse=False)
    elif head._forward_hooks or head._forward_pre_hooks:
        yield
        return
    hidden: list[Tensor] = []

    def set_aside(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if torch.compiler.is_compiling():  # a compiler would trace the deferred logits
            return None
        hidden.append(inputs[0])
        return (inputs[0].detach()[..., :0, :],)

    def defer(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if not hidden:
            return output
        trained = tuple(p for p in head.parameters() if p.requires_grad)
        return DeferredLogits(hidden.pop(), Head(head.forward, trained), output.detach())

    hooks = head.register_forward_pre_hook(set_aside), head.register_forward_hook(defer)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
