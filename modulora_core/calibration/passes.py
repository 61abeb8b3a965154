"""Runs all batches through one block, and stops each of them where weights are packed next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import accumulate

from greenlet import getcurrent, greenlet
from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration.blocks import Block
from modulora_core.calibration.calls import BlockCall
from modulora_core.calibration.observe import Key, ignore
from modulora_core.calibration.stages import Order, StageBatch, StageInputs, TokenWeights


class Passes:
    """All batches in one block. They stop at each stage, whose inputs are collected.

    Args:
        states: the hidden states before the block, ``[samples, seq_len, hidden]``;
            :meth:`finish` replaces them by those after it.
        calls: the block's call for each batch; batches: the samples of each batch.
        paused_bytes: the memory for activations of paused batches; 0 lets no batch pause.
        first_held_out, held_out_weights, token_weights: see :class:`StageInputs`.
    """

    def __init__(
        self,
        block: Block,
        states: Tensor,
        calls: Sequence[BlockCall],
        batches: Sequence[slice],
        *,
        paused_bytes: int,
        first_held_out: int,
        held_out_weights: TokenWeights,
        token_weights: TokenWeights,
    ) -> None:
        self._block, self._states, self._calls, self._batches = block, states, calls, batches
        self._inputs_of = partial(
            StageInputs, block, first_held_out=first_held_out, held_out_weights=held_out_weights,
            token_weights=token_weights,
        )  # fmt: skip
        # only the end of a batch shows which experts it used
        self._stops = not block.has_experts
        widest = max((max(s.in_features, s.out_features) for s in block.sites.values()), default=0)
        # an estimate of what a paused token holds: twice a residual and the widest layer's input
        token_bytes = 2 * (states.shape[2] + widest) * states.element_size()
        sizes = [token_bytes * (b.stop - b.start) * states.shape[1] for b in batches]
        self._pauses = [self._stops and total <= paused_bytes for total in accumulate(sizes)]
        self._paused: dict[int, greenlet] = {}
        self._outputs: dict[int, Tensor] = {}

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
            self._continue(i)
        self._block.listen(ignore)
        if distributed.world_size() > 1:
            inputs.add_up()
        return inputs

    def _see(self, inputs: StageInputs, batch: StageBatch, key: Key, x: Tensor) -> None:
        """Add the input of a product to H, and stop the batch after the stage's last input."""
        if inputs.add(batch, key, x) and self._stops:
            getcurrent().parent.switch()

    def advance(self, states: Tensor) -> None:
        """Replace other hidden states of the same samples by those after the block as it is."""
        for i, batch in enumerate(self._batches):
            states[batch] = self._run(i, states)

    def discard(self) -> None:
        """Drop the paused batches. Later runs begin at the block's beginning."""
        self._paused.clear()
        self._outputs.clear()

    def finish(self) -> None:
        """Replace the hidden states by those after the block, whose weights are all packed."""
        for i, batch in enumerate(self._batches):
            if i in self._paused:
                self._continue(i)
                self._states[batch] = self._outputs[i]
            else:
                self._states[batch] = self._run(i, self._states)

    def _run(self, i: int, states: Tensor) -> Tensor:
        hidden = states[self._batches[i]].to(self._block.device)
        return self._calls[i].run(self._block.module, hidden)

    def _continue(self, i: int) -> None:
        """Run batch ``i`` to its next stop, from its pause or from the block's beginning."""
        runner = self._paused.get(i) or greenlet(partial(self._run, i, self._states))
        if self._pauses[i]:
            self._paused[i] = runner
        if not runner.dead:
            output = runner.switch()
            if runner.dead and self._pauses[i]:
                self._outputs[i] = output
