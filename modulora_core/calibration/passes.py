"""Runs all batches through one block, up to the weights that are packed next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration.blocks import Block
from modulora_core.calibration.calls import BlockCall
from modulora_core.calibration.observe import Key, ignore
from modulora_core.calibration.stages import Order, StageBatch, StageInputs, TokenWeights


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the block's forward after the last input of a stage."""


class Passes:
    """All batches in one block. Each stage runs them again, and stops after its inputs.

    Args:
        states: the hidden states before the block, ``[samples, seq_len, hidden]``.
        calls: the block's call for each batch; batches: the samples of each batch.
        first_held_out, held_out_weights, token_weights: see :class:`StageInputs`.
    """

    def __init__(
        self,
        block: Block,
        states: Tensor,
        calls: Sequence[BlockCall],
        batches: Sequence[slice],
        *,
        first_held_out: int,
        held_out_weights: TokenWeights,
        token_weights: TokenWeights,
    ) -> None:
        self._block, self._states, self._calls, self._batches = block, states, calls, batches
        self._inputs_of = partial(
            StageInputs, block, first_held_out=first_held_out, held_out_weights=held_out_weights,
            token_weights=token_weights,
        )  # fmt: skip

    def find_order(self, *, sequential: bool) -> Order:
        """The order in which the block uses its weights, from a run of the first batch."""
        uses: list[tuple[Key, Tensor]] = []
        self._block.listen(lambda key, x: uses.append((key, x)))
        self._run(0, self._states)
        self._block.listen(ignore)
        return distributed.from_first(Order.of(uses, self._block.sites, sequential=sequential))

    def collect(self, order: Order, stage: Collection[str]) -> StageInputs:
        """Run each batch until all inputs of ``stage`` arrived, and sum their H."""
        inputs = self._inputs_of(order, stage)
        for i, samples in enumerate(self._batches):
            self._block.listen(partial(self._see, inputs, inputs.begin(samples)))
            with suppress(_Enough):
                self._run(i, self._states)
        self._block.listen(ignore)
        if distributed.world_size() > 1:
            inputs.add_up()
        return inputs

    def _see(self, inputs: StageInputs, batch: StageBatch, key: Key, x: Tensor) -> None:
        # only the end of a batch shows which experts it used
        if inputs.add(batch, key, x) and not self._block.has_experts:
            raise _Enough

    def advance(self, states: Tensor) -> None:
        """Replace hidden states of the samples by those after the block as it is."""
        for i, batch in enumerate(self._batches):
            states[batch] = self._run(i, states)

    def _run(self, i: int, states: Tensor) -> Tensor:
        hidden = states[self._batches[i]].to(self._block.device)
        return self._calls[i].run(self._block.module, hidden)
