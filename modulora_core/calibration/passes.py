"""One batch on its way through a block, stopped before each stage until the stage's weights are packed.

A batch stops in one of two ways:

* it *pauses*: its forward runs in a greenlet of its own and is left in the middle, activations and all, so that the block is
  run once for everything;
* where activations would take too much memory, or experts make it unknown which weight comes next, it is *run again* from
  the block's beginning for every stage, and once more for the output.

Both give the same numbers: each product is the same product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from greenlet import greenlet
from torch import Tensor

from modulora_core.calibration.block import Block
from modulora_core.calibration.blocks import Call
from modulora_core.calibration.moments import SecondMoment
from modulora_core.calibration.observe import Key, ignore
from modulora_core.calibration.order import Order
from modulora_core.calibration.states import HiddenStates


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Leaves a forward that has told all that was wanted."""


class Collector:
    """A listener that sums up H for the weights of one stage.

    Args:
        order: of the block.
        stage: names of the stage's parameters.
        early: leave a forward that isn't paused when the stage's inputs have been seen. Not for experts: which of
            them a batch uses is known at its end only.
        sums: whether H is wanted at all.
        token_weights: of the samples that are held out, by matrix and sample: each input's weight in the matrix's own H.
    """

    def __init__(
        self,
        order: Order,
        stage: Collection[str],
        *,
        early: bool,
        sums: bool,
        token_weights: Mapping[Key, Sequence[Tensor]] | None = None,
    ) -> None:
        self._order, self._stage, self._early, self._sums = order, stage, early, sums
        self._leaders = {leader for leader in order.leaders.values() if leader.name in stage}
        self._waiting = set(self._leaders)
        self._caller: greenlet | None = None
        self._moments: dict[Key, SecondMoment] = {}
        self._token_weights = token_weights or {}
        self._held_out: dict[Key, SecondMoment] = {}
        self._sample: int | None = None
        self._rows: dict[Key, int] = {}  # of the current sample, so far

    def begin(self, caller: greenlet | None, *, held_out: int | None = None) -> None:
        """A batch goes on; if it pauses, ``caller`` is where to go meanwhile. ``held_out`` is its number where it is one sample that is."""
        self._waiting = set(self._leaders)
        self._caller = caller
        self._sample = held_out
        self._rows.clear()

    def __call__(self, key: Key, x: Tensor) -> None:
        if key.name not in self._stage:
            return
        if self._sums and self._order.leader(key) == key:
            if self._sample is None:
                self._moments.setdefault(key, SecondMoment(x.shape[-1], x.device)).add(x)
            else:  # at once for all that are multiplied by it: the batch may stop before they are
                for each in self._order.group(key):
                    self._add_weighted(each, x, self._sample)
        self._waiting.discard(key)
        if self._caller is not None:
            self._caller.switch()
        elif self._early and not self._waiting:
            raise _Stop

    def _add_weighted(self, key: Key, x: Tensor, sample: int) -> None:
        rows = x.reshape(-1, x.shape[-1])
        start = self._rows.get(key, 0)
        weights = self._token_weights[key][sample][start : start + len(rows)]
        assert len(weights) == len(rows), f"{key}: the block multiplied other inputs than before"
        self._rows[key] = start + len(rows)
        moment = self._held_out.setdefault(key, SecondMoment(x.shape[-1], x.device))
        moment.add(rows * weights.to(rows).sqrt()[:, None])

    def moment(self, key: Key, in_features: int, device: torch.device) -> SecondMoment:
        """What was seen of ``key``'s inputs; an empty sum if there were none."""
        return self._moments.get(self._order.leader(key)) or SecondMoment(in_features, device)

    def held_out(self, key: Key, in_features: int, device: torch.device) -> SecondMoment:
        """What was seen of ``key``'s weighted inputs in the samples that are held out."""
        return self._held_out.get(key) or SecondMoment(in_features, device)


class Passes:
    """All batches in one block, and the hidden states that they begin and end with.

    Args:
        block: the block.
        states: the samples' hidden states; :meth:`finish` replaces them.
        calls: what the block is called with, for each batch; batches: the samples of each.
        paused_bytes: what the activations of paused batches may take; 0 lets none pause.
        held_out: the samples from this one on are held out, each in a batch of its own.
    """

    def __init__(
        self,
        block: Block,
        states: HiddenStates,
        calls: Sequence[Call],
        batches: Sequence[slice],
        *,
        paused_bytes: int,
        held_out: int | None = None,
    ) -> None:
        self._states, self._batches, self._calls = states, batches, calls
        self._held_out = held_out
        self._block = block
        self._passes: list[Pass] = []
        room = paused_bytes
        for call, batch in zip(calls, batches, strict=True):
            room -= self._activation_bytes(states[batch])
            self._passes.append(Pass(partial(self._forward, call, batch), pauses=room >= 0))

    def _forward(self, call: Call, batch: slice) -> Tensor:
        return call.run(self._block.module, self._states[batch])

    def _activation_bytes(self, hidden: Tensor) -> int:
        """What a batch holds at most where it pauses, by estimate: a residual and the widest layer's input, twice."""
        widest = max(
            (max(s.in_features, s.out_features) for s in self._block.sites.values()), default=0
        )
        return (
            2
            * hidden.shape[0]
            * hidden.shape[1]
            * (hidden.shape[2] + widest)
            * hidden.element_size()
        )

    def order(self) -> Order:
        """In which order the block uses its weights, from the first batch."""
        return self._block.order(self._passes[0].run)

    def collect(self, collector: Collector) -> None:
        """Let ``collector`` see the inputs of its stage, of every batch."""
        self._block.listener = collector
        for batch, one in zip(self._batches, self._passes, strict=True):
            held_out = None
            if self._held_out is not None and batch.start >= self._held_out:
                held_out = batch.start - self._held_out
            collector.begin(None if one.paused is None else one.paused.parent, held_out=held_out)
            one.collect()
        self._block.listener = ignore

    def advance(self, states: HiddenStates) -> None:
        """Replace other hidden states of the same samples by those after the block as it is now."""
        for call, batch in zip(self._calls, self._batches, strict=True):
            states[batch] = call.run(self._block.module, states[batch])

    def begin_again(self) -> None:
        """Forget how far the batches came: they run the block from its beginning."""
        self._passes = [Pass(one.run, pauses=False) for one in self._passes]

    def finish(self) -> None:
        """Replace the hidden states by those after the block, whose weights are all packed now."""
        for batch, one in zip(self._batches, self._passes, strict=True):
            self._states[batch] = one.finish()

    def close(self) -> None:
        """Let go of the batches that still pause, with what they hold."""
        self._passes.clear()


class Pass:
    """One batch in one block.

    Args:
        forward: runs the block on the batch's hidden state and gives the next.
        pauses: pause instead of running again.
    """

    def __init__(self, forward: Callable[[], Tensor], *, pauses: bool) -> None:
        self.run = forward
        self.paused = greenlet(forward) if pauses else None
        self._output: Tensor | None = None

    def collect(self) -> None:
        """Go on to where the current stage's inputs have been seen."""
        if self.paused is None:
            try:
                self.run()
            except _Stop:
                return
        else:
            self._continue()

    def finish(self) -> Tensor:
        """The hidden state after the block, whose weights are all packed now."""
        if self.paused is None:
            return self.run()
        while self._output is None:
            self._continue()
        return self._output

    def _continue(self) -> None:
        if self.paused is not None and not self.paused.dead:
            output = self.paused.switch()
            if self.paused.dead:
                self._output = output
