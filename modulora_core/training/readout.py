"""Hidden states in the place of logits, for the code that needs a few rows of logits at a time.

    z = f(h Wᵀ + b)      h : [..., hidden]   W : [vocabulary, hidden]   z : [..., vocabulary]

A causal language model's forward ends with its head, perhaps a scale and a soft cap f, and the
loss. Inside :func:`read_out` the forward computes the logits of one position alone, by
transformers' own argument ``logits_to_keep``, and leaves h and the head in a :class:`Readout`. The
logits of that position must be what the head makes of h. Of a model that does something else with
its logits, the forward runs again, and the Readout has them whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from modulora_core.layers import QuantLinear

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Fields of configs by which models multiply logits. ``logits_scaling`` divides them."""

_WHOLE: WeakSet[nn.Module] = WeakSet()
"""Models whose logits were something else. It spares them the forward for one position."""


@dataclass(frozen=True, slots=True)
class Head:
    """z = f(h Wᵀ + b) as a function of h, row by row.

    Attributes:
        linear: the layer's forward, ``[..., hidden]`` to ``[..., vocabulary]``.
        size: the number of logits; 0 if the layer gives as many as it gets.
        parameters: its parameters that train.
        scale: the number that multiplies logits.
        cap: the soft cap c of logits, c tanh(z / c).
    """

    linear: Callable[[Tensor], Tensor]
    size: int = 0
    parameters: tuple[nn.Parameter, ...] = ()
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.changed(self.linear(hidden))

    def changed(self, logits: Tensor) -> Tensor:
        """Scale and cap the layer's result."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


WHOLE = Head(lambda logits: logits)
"""The head of whole logits."""


@dataclass(slots=True)
class Readout:
    """Hidden states that a forward left, and the function that makes logits of rows of them.

    Attributes:
        hidden: h, ``[..., hidden]``, or whole logits where ``head`` is :data:`WHOLE`; None before
            the forward has computed them, and after a loss has taken them.
        head: makes logits of ``hidden``.
        is_alone: whether the running forward computes logits of its last position only.
    """

    hidden: Tensor | None = None
    head: Head = WHOLE
    is_alone: bool = False


@contextmanager
def read_out(model: Any) -> Iterator[Readout]:
    """Let forwards of ``model`` in this block leave hidden states instead of logits.

    Args:
        model: a transformers model, not wrapped.

    Yields:
        the Readout of the last forward, which a running one fills.
    """
    head, linear, decoder = _head(model), model.get_output_embeddings(), model.get_decoder()
    able = head is not None and decoder is not model
    able = able and "logits_to_keep" in inspect.signature(type(model).forward).parameters
    readout, expected = Readout(), None

    def keep_one(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal expected
        readout.hidden = expected = None
        known = not able or model in _WHOLE or "logits_to_keep" in kwargs
        readout.is_alone = not (known or torch.compiler.is_compiling())  # it would trace the hooks
        return (args, {**kwargs, "logits_to_keep": 1}) if readout.is_alone else None

    def set_aside(_: nn.Module, __: Any, output: Any) -> None:
        if readout.is_alone:
            assert head is not None
            readout.hidden, readout.head = output[0], head

    def expect(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal expected
        hidden = readout.hidden if readout.is_alone else None
        if hidden is not None and output.device == hidden.device:
            is_last = _close(inputs[0], hidden[:, -1:], 0.0)
            # a copy, since the model may change the head's output in place
            expected = readout.head.changed(output.detach().clone()) if is_last else None

    def check(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if readout.is_alone and expected is not None:
            within = 8 * torch.finfo(expected.dtype).eps
            if _close(output.logits.detach(), expected, within):
                return output
        if readout.is_alone:  # the model does something else with its logits
            _WHOLE.add(model)
            kwargs = {name: value for name, value in kwargs.items() if name != "logits_to_keep"}
            readout.hidden, readout.is_alone = None, False
            output = model.forward(*args, **kwargs)
        readout.hidden, readout.head = output.logits, WHOLE
        return output

    handles = [
        model.register_forward_pre_hook(keep_one, with_kwargs=True),
        model.register_forward_hook(check, with_kwargs=True),
    ]
    if able:
        handles += [decoder.register_forward_hook(set_aside), linear.register_forward_hook(expect)]
    try:
        yield readout
    finally:
        for handle in handles:
            handle.remove()


def _head(model: Any) -> Head | None:
    """The head that a transformers model should have by its config, if it is a linear layer.

    A head with hooks wants its output, so it is None. FSDP2's hooks do not: they gather the head's
    shards, which then stay whole until the backward.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear | QuantLinear):
        return None
    if isinstance(linear, FSDPModule):
        linear.set_reshard_after_forward(False, recurse=False)
    elif linear._forward_hooks or linear._forward_pre_hooks:
        return None
    config = model.config.get_text_config()
    found = [value for name in _SCALES if (value := getattr(config, name, None)) is not None]
    scale = found[0] if found else 1 / (getattr(config, "logits_scaling", None) or 1)
    trained = tuple(parameter for parameter in linear.parameters() if parameter.requires_grad)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.forward, linear.out_features, trained, scale, cap)


def _close(one: Tensor, other: Tensor, within: float) -> bool:
    """Whether two tensors are equal, within a part of the largest entry."""
    if one.shape != other.shape:
        return False
    allowed = within * other.abs().amax()
    return not bool(((one - other).abs() > allowed).any())
