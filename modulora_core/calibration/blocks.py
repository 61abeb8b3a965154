"""The decoder blocks of a model, found in its module tree, and what the model calls each of them with.

A model's forward does more than call its blocks: it embeds, makes masks and rotary angles, and hands each block
what it needs (Gemma's blocks with a sliding window get another mask than the others). So its own forward runs once
for each batch, with blocks that only note what they were called with and hand the hidden state on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modulora_core.errors import ModelError
from modulora_core.models.sites import decoder_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """The dotted paths of the decoder blocks, in order: the outermost ``nn.ModuleList`` with most linear weights.

    Raises:
        ModelError: no list of modules holds a linear weight.
    """
    linears = decoder_linears(model)
    most, blocks = 0, []
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path in lists:
        if any(path.startswith(f"{outer}.") for outer in lists):
            continue
        weights = sum(site.numel for site in linears if site.name.startswith(f"{path}."))
        if weights > most:
            most, blocks = (
                weights,
                [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()],
            )
    if not blocks:
        raise ModelError(
            f"{type(model).__name__}: expected decoder blocks in an nn.ModuleList with linear weights, found none; "
            "calibration goes block by block. Choose a quantizer that needs no calibration"
        )
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class Call:
    """What one block is called with for one batch, the hidden state left out, and how it answers.

    Attributes:
        by_name: the hidden state is a keyword argument.
        beside: what the first block returned beside the hidden state; None where it returned a tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    beside: tuple[Any, ...] | None

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The hidden state after ``block``, a module or what calls one."""
        if self.by_name:
            return hidden_of(block(*self.args, **{**self.kwargs, _HIDDEN: hidden}))
        return hidden_of(block(hidden, *self.args, **self.kwargs))

    def answer(self, hidden: Tensor) -> Any:
        """What a block returns with this hidden state."""
        return hidden if self.beside is None else (hidden, *self.beside)

    def sharing(self, other: Call) -> Call:
        """This call with ``other``'s objects where they are equal: batches of one size have the same masks and angles."""
        return Call(_share(self.args, other.args), _share(self.kwargs, other.kwargs), self.by_name,
                    _share(self.beside, other.beside))  # fmt: skip


_HIDDEN = "hidden_states"


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returns: a tensor, or the first of a tuple."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the model's forward after its last block."""


def record_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor
) -> tuple[Tensor, list[Call]]:
    """Run the model's forward up to its blocks.

    Args:
        model: with everything filled in that its forward needs before the first block, and the first block.
        blocks: the decoder blocks; the others may be on the meta device.
        ids: one batch of tokens, int64 ``[samples, seq_len]``.

    Returns:
        the hidden state that enters the first block, ``[samples, seq_len, hidden]``, and a call for each block.

    Raises:
        ModelError: the blocks aren't run once each, in their order, each on what the one before it gave.
    """
    recorder = _Recorder(model, len(blocks))
    originals = [block.forward for block in blocks]
    for number, block in enumerate(blocks):
        block.forward = recorder.stand_in(number, originals[number])
    try:
        model(input_ids=ids, use_cache=False)
    except _Enough:
        assert recorder.hidden is not None
        return recorder.hidden, recorder.calls
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's own
    raise ModelError(f"{type(model).__name__}: {recorder.problem('some were not run')}")


def logits_after(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    calls: Sequence[Call],
    ids: Tensor,
    hidden: Tensor,
) -> Tensor:
    """The model's logits where ``hidden`` comes out of its last block; differentiable in ``hidden``.

    Args:
        model: with everything outside of the blocks filled in.
        blocks: they aren't run, and may be on the meta device.
        calls: of each block for this batch, from :func:`record_calls`.
        ids: the batch, int64 ``[samples, seq_len]``.
        hidden: ``[samples, seq_len, hidden]``.

    Returns:
        ``[samples, seq_len, vocabulary]``.
    """
    for block, call in zip(blocks, calls, strict=True):
        answer = call.answer(hidden)
        block.forward = lambda *_args, _answer=answer, **_kwargs: _answer
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for block in blocks:
            del block.forward
    return logits


class _Recorder:
    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self.hidden: Tensor | None = None
        self.calls: list[Call] = []
        self._model, self._count = model, count
        self._beside: tuple[Any, ...] | None = None

    def stand_in(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            by_name = _HIDDEN in kwargs
            hidden = kwargs[_HIDDEN] if by_name else args[0]
            self._check(number, hidden)
            if number == 0:
                self.hidden = hidden
                output = forward(*args, **kwargs)
                self._beside = None if isinstance(output, Tensor) else tuple(output[1:])
            rest = {name: value for name, value in kwargs.items() if name != _HIDDEN}
            self.calls.append(Call(args if by_name else args[1:], rest, by_name, self._beside))
            if number == self._count - 1:
                raise _Enough
            return self.calls[-1].answer(hidden)

        return run

    def _check(self, number: int, hidden: Any) -> None:
        if number != len(self.calls):
            raise ModelError(
                f"{type(self._model).__name__}: {self.problem(f'block {number} came after {len(self.calls)} others')}"
            )
        if not isinstance(hidden, Tensor) or (
            self.hidden is not None and not _same(hidden, self.hidden)
        ):
            raise ModelError(
                f"{type(self._model).__name__}: {self.problem(f'block {number} got another hidden state')}"
            )

    @staticmethod
    def problem(what: str) -> str:
        return (
            f"expected a model that runs its decoder blocks once each, in order, each on the hidden state that the one before it "
            f"gave; {what}. Calibration can't go through it block by block: choose a quantizer that needs none"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def _share(value: Any, other: Any) -> Any:
    if isinstance(value, Tensor):
        alike = isinstance(other, Tensor) and value.dtype == other.dtype and _same(value, other)
        return other if alike else value
    if type(value) is not type(other):
        return value
    if type(value) in (tuple, list) and len(value) == len(other):
        return type(value)(_share(v, o) for v, o in zip(value, other, strict=True))
    if isinstance(value, dict) and value.keys() == other.keys():
        return {name: _share(v, other[name]) for name, v in value.items()}
    return value
