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

from modulora_core.calibration.blocks import block_modules, block_prefixes, find_blocks, outer_model
from modulora_core.errors import ModelError
from modulora_core.models import ModelSource

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


class OuterModel:
    """A dense model with values outside of its decoder blocks. It calls blocks that run elsewhere.

    Args:
        head: whether the output head gets values, for :meth:`logits_after`.

    Raises ModelError.
    """

    def __init__(self, source: ModelSource, device: torch.device, *, head: bool) -> None:
        self._source, self._device, self._paths = source, device, find_blocks(source.outline)
        self.model = outer_model(source, self._paths, device, head=head)
        self._blocks = [self.model.get_submodule(path) for path in self._paths]
        if head:
            self.model.tie_weights()
            _check_filled(self.model, block_prefixes(source))

    def record(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[BlockCall]]]:
        """Run the forward up to the last block, for each batch of ids, ``[samples, seq_len]``.

        Yields:
            the hidden state before the first block, ``[samples, seq_len, hidden]``, and a call for
            each block.

        Raises ModelError: the model does not pass the hidden state through its blocks in order.
        """
        first: list[BlockCall] = []
        for ids in batches:
            hidden, calls = _record(self.model, self._blocks, ids.to(self._device))
            first = first or calls
            yield hidden, [call.sharing(other) for call, other in zip(calls, first, strict=True)]

    def drop_first_block(self) -> None:
        """Free the values of the first block, which only :meth:`record` needs."""
        [self._blocks[0]] = block_modules(self._source, self._paths[:1])
        self.model.set_submodule(self._paths[0], self._blocks[0])

    def logits_after(self, calls: Sequence[BlockCall], ids: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits if its last block returned ``hidden``; differentiable in ``hidden``.

        The blocks do not run. ``ids`` and ``calls`` are the batch and its calls.
        """
        answers = [call.answer(hidden) for call in calls]
        with _forwards(self._blocks, [lambda *_, answer=each, **__: answer for each in answers]):
            logits: Tensor = self.model(input_ids=ids.to(self._device), use_cache=False).logits
        return logits


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


def _check_filled(model: nn.Module, inside: tuple[str, ...]) -> None:
    parameters = model.named_parameters()
    empty = [name for name, p in parameters if p.is_meta and not name.startswith(inside)]
    if empty:
        raise ModelError(
            f"{type(model).__name__}: expected values for {', '.join(empty[:3])}, got none in its "
            "files; its logits need them: give the whole model"
        )
