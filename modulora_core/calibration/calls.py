"""Records how a model calls its decoder blocks, so that they can run without the model.

A model embeds tokens, computes masks and rotary angles, and passes each block its arguments.
Its own forward therefore runs once per batch, with blocks that only record their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modulora_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The arguments of one block for one batch, without the hidden state.

    Attributes:
        kwargs: has the key ``hidden_states`` if the model passes the hidden state by name.
        beside: the other values that the first block returned; None if it returned a tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    beside: tuple[Any, ...] | None

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The hidden state after ``block``."""
        if _HIDDEN in self.kwargs:
            return _hidden_of(block(*self.args, **{**self.kwargs, _HIDDEN: hidden}))
        return _hidden_of(block(hidden, *self.args, **self.kwargs))

    def answer(self, hidden: Tensor) -> Any:
        """The value that a block with this result returns."""
        return hidden if self.beside is None else (hidden, *self.beside)

    def sharing(self, other: BlockCall) -> BlockCall:
        """The same call with ``other``'s tensors where they are equal, such as masks."""
        return BlockCall(
            _share(self.args, other.args),
            _share(self.kwargs, other.kwargs),
            _share(self.beside, other.beside),
        )


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the model's forward at its last block."""


def record_calls(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    ids: Tensor,
    batches: Iterable[slice],
    device: torch.device,
) -> Iterator[tuple[slice, Tensor, list[BlockCall]]]:
    """Run the forward of an ``outer_model`` up to its last block, for each batch of ``ids``.

    Yields:
        the batch; the hidden state before the first block, ``[samples, seq_len, hidden]``; a call
        for each block.

    Raises:
        ModelError: the model does not pass the hidden state through its blocks in order.
    """
    first: list[BlockCall] = []
    for batch in batches:
        hidden, calls = _record(model, blocks, ids[batch].to(device))
        first = first or calls
        yield batch, hidden, [call.sharing(other) for call, other in zip(calls, first, strict=True)]


def _record(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor
) -> tuple[Tensor, list[BlockCall]]:
    before_first: list[Tensor] = []
    calls: list[BlockCall] = []
    real_first = blocks[0].forward

    def forward(number: int, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs[_HIDDEN] if _HIDDEN in kwargs else args[0]
        if number != len(calls):
            raise refused(f"block {number} ran after {len(calls)} others")
        if calls and not _equal(hidden, before_first[0]):
            raise refused(f"block {number} got another hidden state")
        beside = calls[0].beside if calls else None
        if not calls:
            before_first.append(hidden)
            output = real_first(*args, **kwargs)
            beside = None if isinstance(output, Tensor) else tuple(output[1:])
        by_name = {_HIDDEN: None} if _HIDDEN in kwargs else {}
        calls.append(BlockCall(args if by_name else args[1:], {**kwargs, **by_name}, beside))
        if len(calls) == len(blocks):
            raise _Enough
        return calls[-1].answer(hidden)

    def refused(reason: str) -> ModelError:
        return ModelError(
            f"{type(model).__name__}: expected a model that runs its decoder blocks once each, in "
            f"order, each on the hidden state of the one before it; {reason}. Calibration goes "
            "block by block: choose a quantizer that needs none"
        )

    with _forwards(blocks, [partial(forward, number) for number in range(len(blocks))]):
        try:
            model(input_ids=ids, use_cache=False)
        except _Enough:
            return before_first[0], calls
    raise refused("some did not run")


def logits_after(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    calls: Sequence[BlockCall],
    ids: Tensor,
    hidden: Tensor,
) -> Tensor:
    """The model's logits if its last block returned ``hidden``; differentiable in ``hidden``.

    The blocks do not run. ``ids`` and ``calls`` are the batch and its calls.
    """
    answers = [call.answer(hidden) for call in calls]
    with _forwards(blocks, [lambda *_, answer=each, **__: answer for each in answers]):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def _forwards(
    blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Give these module objects other forwards for a while."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the method of the class


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _equal(a: Any, b: Any) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and a.dtype == b.dtype and torch.equal(a, b)


def _share(value: Any, other: Any) -> Any:
    """``value`` with the tensors of ``other`` that are equal."""
    if _equal(value, other):
        return other
    if type(value) in (tuple, list) and type(value) is type(other) and len(value) == len(other):
        return type(value)(map(_share, value, other))
    if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
        return {name: _share(v, other[name]) for name, v in value.items()}
    return value
