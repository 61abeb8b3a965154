"""Logits that aren't computed until somebody asks for them, and then a few rows at a time if that is enough.

    z = f(h Wᵀ + b)        h : [..., hidden]   W : [vocabulary, hidden]   z : [..., vocabulary]   f : pointwise

A causal language model's forward ends with its head, perhaps a pointwise function of what the head gives (a scale, a soft cap), and
the loss. In :func:`deferred_head` the head gives a :class:`DeferredLogits`: it keeps h, notes f, and multiplies when it is read. So the
model's own forward runs as it is written, with all that it does besides (an auxiliary loss of experts), and a loss that knows
about chunks (:mod:`modulora_core.training.chunked_loss`) never needs z whole. Code that doesn't know gets z whole, as ever, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.layers import QuantLinear

_POINTWISE = {
    "mul",
    "div",
    "true_divide",
    "tanh",
    "float",
    "double",
    "to",
    "contiguous",
    "clamp",
    "add",
    "sub",
    "neg",
}
"""Names of torch's functions that keep rows apart and whose other operands are no tensors. Any other function gets z whole: a missing
name costs memory and never a wrong result."""

_FACTS = {"size", "dim", "numel", "is_floating_point", "__len__"}
_PROPERTIES = {"shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda"}


@dataclass(frozen=True, slots=True)
class Head:
    """z = f(h Wᵀ + b) as a function of h, each row by itself.

    Attributes:
        linear: the layer's forward, ``[..., hidden]`` to ``[..., vocabulary]``.
        parameters: those of the layer that train.
        steps: f, the pointwise functions that come after the layer.
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
    """Stands for ``head(hidden)`` without being it: a tensor with a shape, a dtype and a device, and no storage.

    Args:
        hidden: h, ``[..., hidden]``.
        head: what they go through.
    """

    hidden: Tensor
    head: Head
    _whole: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, head: Head) -> DeferredLogits:
        with torch.no_grad():  # no rows at all tell the width and the dtype
            sample = head(hidden.reshape(-1, hidden.shape[-1])[:0])
        logits: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], sample.shape[-1]), dtype=sample.dtype, device=sample.device
        )
        logits.hidden, logits.head, logits._whole = hidden, head, None
        return logits

    @property
    def is_whole(self) -> bool:
        """Whether somebody needed all of it: it takes its memory now, and may have been changed in place."""
        return self._whole is not None

    def whole(self) -> Tensor:
        """An ordinary tensor of this shape, differentiable in ``hidden`` and the head's parameters."""
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
            if _is_fact(func):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if _is_pointwise(func, args[1:], kwargs):
                step = _step(func, args[1:], kwargs)
                return DeferredLogits(
                    first.hidden, replace(first.head, steps=(*first.head.steps, step))
                )
        return func(*_whole(args), **_whole(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} reached logits that are not there")


def _is_fact(func: Callable[..., Any]) -> bool:
    """Whether ``func`` only asks for what is known without z: ``z.shape``, ``z.size()``."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") in _PROPERTIES  # type: ignore[attr-defined]
    return getattr(func, "__name__", "") in _FACTS


def _is_pointwise(
    func: Callable[..., Any], others: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    if getattr(func, "__name__", "") not in _POINTWISE:
        return False
    return not any(isinstance(operand, Tensor) for operand in (*others, *kwargs.values()))


def _step(
    func: Callable[..., Tensor], others: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    return lambda logits: func(logits, *others, **kwargs)


def _whole(value: Any) -> Any:
    """``value`` with every deferred tensor in it replaced."""
    if isinstance(value, DeferredLogits):
        return value.whole()
    if isinstance(value, list | tuple):
        return type(value)(map(_whole, value))
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


@contextmanager
def deferred_head(head: nn.Module | None) -> Iterator[None]:
    """In this block ``head`` gives :class:`DeferredLogits`.

    It does if it is a linear layer, dense or packed, with an adapter or not: then each row of logits comes from one row of hidden
    states and the head's own parameters. A layer of another kind, or one with hooks, which want to see its output (FSDP2 gathers a
    layer's shards in them), works as ever.
    """
    if (
        not isinstance(head, nn.Linear | QuantLinear)
        or head._forward_hooks
        or head._forward_pre_hooks
    ):
        yield
        return
    attributes = vars(head)
    before = attributes.get(
        "forward"
    )  # accelerate puts one there when it spreads a model over devices
    trained = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    rows = Head(head.forward, trained)

    def deferred(hidden: Tensor) -> Tensor:
        # a compiler that traces the model would trace the head's replacement
        return rows(hidden) if torch.compiler.is_compiling() else DeferredLogits(hidden, rows)

    attributes["forward"] = deferred
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before
