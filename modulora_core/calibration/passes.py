"""Runs all batches through one block, and stops each of them where weights are packed next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from modulora_core.calibration.blocks import Block
from modulora_core.calibration.calls import Call
from modulora_core.calibration.moments import SecondMoment
from modulora_core.calibration.observe import Key, ignore
from modulora_core.calibration.packing import HeldOutCalibration
from modulora_core.spec import Calibration

TokenWeights = Mapping[str, Sequence[Sequence[Tensor]]]
"""By parameter, matrix and held-out sample: a weight for each input, fp32 ``[rows]``."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order in which one run of a block used its weights.

    Attributes:
        stages: the parameters by first use. Parameters with the same input, such as q, k and v,
            are one stage. Unused ones come last.
        leaders: for each used matrix, the first one with the same input. Only leaders sum H.
    """

    stages: tuple[tuple[str, ...], ...]
    leaders: Mapping[Key, Key]

    @classmethod
    def of(
        cls, uses: Iterable[tuple[Key, Tensor]], names: Iterable[str], *, sequential: bool
    ) -> Order:
        """The order of all ``names``. All inputs must still exist: freed memory is used again.

        If it is not ``sequential``, there is one stage: every layer sees outputs of dense weights.
        """
        leaders: dict[Key, Key] = {}
        first: dict[object, Key] = {}
        stage_of: dict[str, str] = {}
        for key, x in uses:
            identity = (x.data_ptr(), x.shape, x.stride(), x._version)
            leaders.setdefault(key, first.setdefault(identity, key))
            stage_of.setdefault(key.name, stage_of.get(leaders[key].name, key.name))
        stages: dict[str, list[str]] = {}
        for name in dict.fromkeys([*stage_of, *names]):
            stages.setdefault(stage_of.get(name, name) if sequential else "", []).append(name)
        return cls(tuple(map(tuple, stages.values())), leaders)

    def leader(self, key: Key) -> Key:
        """The matrix that sums H for ``key``: itself if it was not used, as some experts are."""
        return self.leaders.get(key, key)

    def followers(self, leader: Key) -> list[Key]:
        """All matrices with the same input as ``leader``, itself among them."""
        return [key for key in {leader: leader, **self.leaders} if self.leader(key) == leader]


class Collector:
    """A listener that sums H for one stage, then stops the batch.

    Args:
        order: the order of the block; stage: the parameters of the stage.
        stops: whether a batch stops once all inputs of the stage arrived. Batches through experts
            run to their end, because only the end shows which experts they used.
        weights: the token weights of held-out samples, if there are any.
        device: the device of H.
    """

    def __init__(
        self,
        order: Order,
        stage: Collection[str],
        *,
        stops: bool,
        weights: TokenWeights,
        device: torch.device,
    ) -> None:
        self._order, self._stage, self._stops = order, stage, stops
        self._weights, self._device = weights, device
        self._leaders = {leader for leader in order.leaders.values() if leader.name in stage}
        self._moments: dict[Key, SecondMoment] = {}
        self._held_out: dict[Key, SecondMoment] = {}

    def begin(self, sample: int | None) -> None:
        """A batch begins. ``sample`` is its number if it is one held-out sample."""
        self._waiting, self._sample = set(self._leaders), sample
        self._rows = Counter[Key]()  # of this sample, so far

    def __call__(self, key: Key, x: Tensor) -> None:
        if key.name not in self._stage:
            return
        if self._order.leader(key) == key:
            rows = x.reshape(-1, x.shape[-1])
            if self._sample is None:
                self._add(self._moments, key, rows)
            else:  # for all matrices with this input: the batch may stop before they multiply
                for each in self._order.followers(key):
                    weights = self._next_weights(each, len(rows), self._sample)
                    self._add(self._held_out, each, rows * weights.to(rows).sqrt()[:, None])
        self._waiting.discard(key)
        if self._stops and not self._waiting:
            getcurrent().parent.switch()

    def _add(self, moments: dict[Key, SecondMoment], key: Key, rows: Tensor) -> None:
        if key not in moments:
            moments[key] = SecondMoment(rows.shape[1], self._device)
        moments[key].add(rows)

    def _next_weights(self, key: Key, count: int, sample: int) -> Tensor:
        """The weights of the next ``count`` inputs in a held-out sample."""
        start = self._rows[key]
        self._rows[key] += count
        weights = self._weights[key.name][key.index][sample][start : start + count]
        assert len(weights) == count, f"{key}: the block multiplied other inputs than before"
        return weights

    def calibration(self, key: Key, in_features: int, layer: str) -> Calibration:
        """H of one matrix; with held-out samples a :class:`HeldOutCalibration`.

        Raises:
            WorkError: H of ``layer`` is not finite.
        """

        def mean(moments: Mapping[Key, SecondMoment], key: Key) -> Calibration:
            return (moments.get(key) or SecondMoment(in_features, self._device)).mean(layer)

        found = mean(self._moments, self._order.leader(key))
        if not self._weights:
            return found
        return HeldOutCalibration(found.hessian, found.samples, mean(self._held_out, key))


class Passes:
    """All batches in one block.

    Args:
        block: the block.
        states: the hidden states before the block, ``[samples, seq_len, hidden]``;
            :meth:`finish` replaces them by those after it.
        calls: the block's call for each batch; batches: the samples of each batch.
        paused_bytes: the memory for activations of paused batches; 0 lets no batch pause.
        held_out: samples from this number on are held out, each in a batch of its own.
    """

    def __init__(
        self,
        block: Block,
        states: Tensor,
        calls: Sequence[Call],
        batches: Sequence[slice],
        *,
        paused_bytes: int,
        held_out: int,
    ) -> None:
        self._block, self._states, self._calls = block, states, calls
        self._batches, self._held_out = batches, held_out
        sites = block.sites.values()
        widest = max((max(s.in_features, s.out_features) for s in sites), default=0)
        # an estimate of what a paused token holds: twice a residual and the widest layer's input
        token_bytes = 2 * (states.shape[2] + widest) * states.element_size()
        sizes = [token_bytes * (b.stop - b.start) * states.shape[1] for b in batches]
        self._pauses = [total <= paused_bytes for total in accumulate(sizes)]
        self._paused: dict[int, greenlet] = {}
        self._outputs: dict[int, Tensor] = {}

    def order(self, *, sequential: bool) -> Order:
        """The order in which the block uses its weights, from a run of the first batch."""
        uses: list[tuple[Key, Tensor]] = []
        self._block.listen(lambda key, x: uses.append((key, x)))
        self._run(0, self._states)
        self._block.listen(ignore)
        return Order.of(uses, self._block.sites, sequential=sequential)

    def collect(self, collector: Collector) -> None:
        """Let ``collector`` see the inputs of its stage, of every batch."""
        self._block.listen(collector)
        for i, batch in enumerate(self._batches):
            sample = batch.start - self._held_out
            collector.begin(sample if sample >= 0 else None)
            self._continue(i)
        self._block.listen(ignore)

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
