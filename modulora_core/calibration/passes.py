"""Runs all batches through one block, and stops each of them where weights are packed next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration.blocks import Block
from modulora_core.calibration.calls import BlockCall
from modulora_core.calibration.moments import SecondMoment
from modulora_core.calibration.observe import Key, ObservedWeight, ignore
from modulora_core.calibration.packing import HeldOutCalibration
from modulora_core.spec import Calibration

TokenWeights = Mapping[str, Sequence[Sequence[Tensor]]]
"""By parameter, matrix and sample: a weight for each input, fp32 ``[rows]``."""


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

    def renamed(self, before: str, after: str) -> Order:
        """The order of an equal block, whose parameters have another prefix."""

        def new(name: str) -> str:
            return after + name.removeprefix(before)

        leaders = {
            Key(new(key.name), key.index): Key(new(leader.name), leader.index)
            for key, leader in self.leaders.items()
        }
        return Order(tuple(tuple(map(new, stage)) for stage in self.stages), leaders)

    def leader(self, key: Key) -> Key:
        """The matrix that sums H for ``key``: itself if it was not used, as some experts are."""
        return self.leaders.get(key, key)

    def followers(self, leader: Key) -> list[Key]:
        """All matrices with the same input as ``leader``, itself among them."""
        return [key for key in {leader: leader, **self.leaders} if self.leader(key) == leader]


class Passes:
    """All batches in one block. They stop at each stage, and H of its inputs is summed.

    Args:
        block: the block.
        states: the hidden states before the block, ``[samples, seq_len, hidden]``;
            :meth:`finish` replaces them by those after it.
        calls: the block's call for each batch; batches: the samples of each batch.
        paused_bytes: the memory for activations of paused batches; 0 lets no batch pause.
        held_out: samples from this number on are held out, each in a batch of its own.
        held_out_weights: the token weights of held-out samples.
        token_weights: of the other samples, for parameters with H = E[w xxᵀ]. Each has one matrix,
            which multiplies all tokens in order.
    """

    def __init__(
        self,
        block: Block,
        states: Tensor,
        calls: Sequence[BlockCall],
        batches: Sequence[slice],
        *,
        paused_bytes: int,
        held_out: int,
        held_out_weights: TokenWeights,
        token_weights: TokenWeights,
    ) -> None:
        self._block, self._states, self._calls = block, states, calls
        self._batches, self._held_out = batches, held_out
        self._held_out_weights, self._token_weights = held_out_weights, token_weights
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

    def collect(self, order: Order, stage: Collection[str]) -> None:
        """Run each batch until all inputs of ``stage`` arrived, and sum their H."""
        self._order, self._stage = order, stage
        self._leaders = {key for key in order.leaders.values() if key.name in stage}
        self._moments: dict[Key, SecondMoment] = {}
        self._held_out_moments: dict[Key, SecondMoment] = {}
        self._block.listen(self._see)
        for i, batch in enumerate(self._batches):
            self._waiting, self._sample = set(self._leaders), batch.start - self._held_out
            self._batch, self._rows = batch, Counter[Key]()  # rows of a held-out sample, so far
            self._continue(i)
        self._block.listen(ignore)
        if distributed.world_size() > 1:
            for key, observed in self._observed(stage):
                if order.leader(key) == key:
                    self._moment(self._moments, key, observed.weight.shape[1]).add_up()

    def unreached(self, name: str) -> list[str]:
        """The matrices of a parameter of the last stage that no token reached."""
        unreached = []
        for key, _ in self._observed([name]):
            moment = self._moments.get(self._order.leader(key))
            if moment is None or moment.samples == 0:
                unreached.append(f"{name}[{key.index}]")
        return unreached

    def _observed(self, names: Collection[str]) -> Iterator[tuple[Key, ObservedWeight]]:
        for name in names:
            for observed in self._block.weights[name]:
                yield observed.key, observed

    def _see(self, key: Key, x: Tensor) -> None:
        """Add the input of a product to H, and stop the batch after the stage's last input."""
        if key.name not in self._stage:
            return
        rows = x.reshape(-1, x.shape[-1])
        if self._order.leader(key) == key:
            if self._sample < 0:
                self._add(self._moments, key, self._weighted(key, rows))
            else:  # for all matrices with this input: the batch may stop before they multiply
                for each in self._order.followers(key):
                    weights = self._next_weights(each, len(rows)).to(rows)
                    self._add(self._held_out_moments, each, rows * weights.sqrt()[:, None])
        self._waiting.discard(key)
        if self._stops and not self._waiting:
            getcurrent().parent.switch()

    def _weighted(self, leader: Key, rows: Tensor) -> Tensor:
        """The rows times √w, with the mean w of all matrices with this input: they share H."""
        found = [
            torch.cat([*self._token_weights[key.name][0][self._batch]])
            for key in self._order.followers(leader)
            if key.name in self._token_weights
        ]
        return rows * torch.stack(found).mean(0).sqrt()[:, None].to(rows) if found else rows

    def _add(self, moments: dict[Key, SecondMoment], key: Key, rows: Tensor) -> None:
        self._moment(moments, key, rows.shape[1]).add(rows)

    def _moment(self, moments: dict[Key, SecondMoment], key: Key, in_features: int) -> SecondMoment:
        if key not in moments:
            moments[key] = SecondMoment(in_features, self._block.device)
        return moments[key]

    def _next_weights(self, key: Key, count: int) -> Tensor:
        """The weights of the next ``count`` inputs in this held-out sample."""
        start = self._rows[key]
        self._rows[key] += count
        of_sample = self._held_out_weights[key.name][key.index][self._sample]
        weights: Tensor = of_sample[start : start + count]
        assert len(weights) == count, f"{key}: the block multiplied other inputs than before"
        return weights

    def calibration(self, key: Key, in_features: int, layer: str) -> Calibration:
        """H of one matrix of the last stage; with held-out samples a :class:`HeldOutCalibration`.

        Raises:
            WorkError: H of ``layer`` is not finite.
        """

        def mean(moments: Mapping[Key, SecondMoment], key: Key) -> Calibration:
            return (moments.get(key) or SecondMoment(in_features, self._block.device)).mean(layer)

        found = mean(self._moments, self._order.leader(key))
        if not self._held_out_weights:
            return found
        return HeldOutCalibration(found.hessian, found.samples, mean(self._held_out_moments, key))

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
