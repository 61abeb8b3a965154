"""In which order a block uses its weights, and which of them are multiplied by the same input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from modulora_core.calibration.observe import Key


@dataclass(frozen=True, slots=True)
class Order:
    """What one run of a block tells.

    Attributes:
        stages: names of parameters in the order of their first use; those with the same input are one stage, as
            q, k and v are.
        leaders: for each matrix that was used, the first that had the same input; H is summed up once, by the leader.
    """

    stages: tuple[tuple[str, ...], ...]
    leaders: Mapping[Key, Key]

    def leader(self, key: Key) -> Key:
        """A matrix that this run didn't use, such as an expert that got no token, leads itself."""
        return self.leaders.get(key, key)

    def group(self, leader: Key) -> list[Key]:
        """All matrices with the same input as ``leader``, itself among them."""
        return [
            leader,
            *(key for key, other in self.leaders.items() if other == leader and key != leader),
        ]

    def merged(self) -> Order:
        """The same with one stage: every layer sees the outputs of dense weights."""
        return Order((tuple(name for stage in self.stages for name in stage),), self.leaders)


class OrderRecorder:
    """A listener that holds on to the inputs of one run, so that none's memory is used again and taken for it."""

    def __init__(self) -> None:
        self._uses: list[tuple[Key, Tensor]] = []

    def __call__(self, key: Key, x: Tensor) -> None:
        self._uses.append((key, x))

    def order(self, names: Iterable[str]) -> Order:
        """The order of all ``names``; those that weren't used come last, a stage each."""
        leaders: dict[Key, Key] = {}
        first: dict[object, Key] = {}
        stage_of: dict[str, str] = {}
        for key, x in self._uses:
            identity = (x.data_ptr(), x.shape, x.stride(), x._version)
            leaders.setdefault(key, first.setdefault(identity, key))
            stage_of.setdefault(key.name, stage_of.get(leaders[key].name, key.name))
        for name in names:
            stage_of.setdefault(name, name)
        stages: dict[str, list[str]] = {}
        for name, stage in stage_of.items():
            stages.setdefault(stage, []).append(name)
        return Order(tuple(map(tuple, stages.values())), leaders)
