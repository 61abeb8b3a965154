"""The order of a block's weights in stages, and the sum of H over one stage's inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core.calibration.blocks import Block
from modulora_core.calibration.moments import SecondMoment
from modulora_core.calibration.observe import Key, ObservedWeight
from modulora_core.calibration.visitor import HeldOutCalibration
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


@dataclass(frozen=True, slots=True)
class StageBatch:
    """A batch on its way to the end of a stage.

    Attributes:
        missing: the matrices that have not multiplied yet.
        rows: the number of inputs so far, by matrix.
    """

    samples: slice
    missing: set[Key]
    rows: Counter[Key]


class StageInputs:
    """Sums H of the inputs of one stage, batch by batch.

    Args:
        first_held_out: samples from this number on are held out, each in a batch of its own.
        held_out_weights: the token weights of held-out samples.
        token_weights: the token weights of the other samples, for parameters with H = E[w xxᵀ].
            Each parameter has one matrix, which multiplies all tokens in order.
    """

    def __init__(
        self,
        block: Block,
        order: Order,
        names: Collection[str],
        *,
        first_held_out: int,
        held_out_weights: TokenWeights,
        token_weights: TokenWeights,
    ) -> None:
        self._block, self._order, self._names = block, order, names
        self._first_held_out = first_held_out
        self._held_out_weights, self._token_weights = held_out_weights, token_weights
        self._moments: dict[Key, SecondMoment] = {}
        self._held_out_moments: dict[Key, SecondMoment] = {}

    def begin(self, samples: slice) -> StageBatch:
        """A batch of these samples at the beginning of the block."""
        missing = {key for key in self._order.leaders.values() if key.name in self._names}
        return StageBatch(samples, missing, Counter())

    def add(self, batch: StageBatch, key: Key, x: Tensor) -> bool:
        """Add the input of a product to H. Returns whether it was the batch's last of the stage."""
        if key.name not in self._names:
            return False
        rows = x.reshape(-1, x.shape[-1])
        if self._order.leader(key) == key:
            if batch.samples.start < self._first_held_out:
                self._add(self._moments, key, self._weighted(batch, key, rows))
            else:  # for all matrices with this input: the batch may stop before they multiply
                for each in self._order.followers(key):
                    weights = self._next_weights(batch, each, len(rows)).to(rows)
                    self._add(self._held_out_moments, each, rows * weights.sqrt()[:, None])
        batch.missing.discard(key)
        return not batch.missing

    def add_up(self) -> None:
        """Add the sums of all processes of a distributed run."""
        for name in self._names:
            for key, observed in self._observed(name):
                if self._order.leader(key) == key:
                    self._moment(self._moments, key, observed.weight.shape[1]).add_up()

    def unreached(self, name: str) -> list[str]:
        """The matrices of a parameter that no token reached."""
        unreached = []
        for key, _ in self._observed(name):
            moment = self._moments.get(self._order.leader(key))
            if moment is None or moment.samples == 0:
                unreached.append(f"{name}[{key.index}]")
        return unreached

    def calibrations(self, name: str) -> Iterator[Calibration]:
        """H of each matrix of a parameter, one at a time, since H of many experts is large.

        With held-out samples each is a :class:`HeldOutCalibration`. Raises WorkError.
        """
        is_stack = self._block.sites[name].experts is not None
        for key, observed in self._observed(name):
            layer = f"{name} of expert {key.index}" if is_stack else name
            in_features = observed.weight.shape[1]
            found = self._mean(self._moments, self._order.leader(key), in_features, layer)
            if self._held_out_weights:
                held_out = self._mean(self._held_out_moments, key, in_features, layer)
                found = HeldOutCalibration(found.hessian, found.samples, held_out)
            yield found

    def _observed(self, name: str) -> Iterator[tuple[Key, ObservedWeight]]:
        for observed in self._block.weights[name]:
            yield observed.key, observed

    def _weighted(self, batch: StageBatch, leader: Key, rows: Tensor) -> Tensor:
        """The rows times √w, with the mean w of all matrices with this input: they share H."""
        found = [
            torch.cat([*self._token_weights[key.name][0][batch.samples]])
            for key in self._order.followers(leader)
            if key.name in self._token_weights
        ]
        return rows * torch.stack(found).mean(0).sqrt()[:, None].to(rows) if found else rows

    def _next_weights(self, batch: StageBatch, key: Key, count: int) -> Tensor:
        """The weights of the next ``count`` inputs in a held-out sample."""
        start = batch.rows[key]
        batch.rows[key] += count
        sample = batch.samples.start - self._first_held_out
        of_sample = self._held_out_weights[key.name][key.index][sample]
        weights: Tensor = of_sample[start : start + count]
        assert len(weights) == count, f"{key}: the block multiplied other inputs than before"
        return weights

    def _add(self, moments: dict[Key, SecondMoment], key: Key, rows: Tensor) -> None:
        self._moment(moments, key, rows.shape[1]).add(rows)

    def _moment(self, moments: dict[Key, SecondMoment], key: Key, in_features: int) -> SecondMoment:
        if key not in moments:
            moments[key] = SecondMoment(in_features, self._block.device)
        return moments[key]

    def _mean(
        self, moments: Mapping[Key, SecondMoment], key: Key, in_features: int, layer: str
    ) -> Calibration:
        return (moments.get(key) or SecondMoment(in_features, self._block.device)).mean(layer)
