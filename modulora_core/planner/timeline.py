"""The bytes of a step over time, also for a model of more equal blocks than were rehearsed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modulora_core.planner.ledger import Bytes, Segment


@dataclass(frozen=True, slots=True)
class Timeline:
    """The segments of a step.

    Attributes:
        segments: in their order.
        repeated: names of the segments that a model of more blocks has more of.
        times: how often each of them comes.
    """

    segments: Sequence[Segment]
    repeated: frozenset[str] = frozenset()
    times: int = 1

    def peak(self) -> tuple[str, Bytes]:
        """The segment in which most bytes are alive, and those bytes by item."""
        name, most = max(self._peaks(), key=lambda named: named[1].total())
        return name, most

    def _peaks(self) -> Iterator[tuple[str, Bytes]]:
        alive = Bytes()
        for segment in self.segments:
            for _ in range(self.times if segment.name in self.repeated else 1):
                yield segment.name, _moved(alive, segment.before, segment.peak)
                alive = _moved(alive, segment.before, segment.after)


def _moved(alive: Bytes, start: Bytes, end: Bytes) -> Bytes:
    """``alive`` after the change from ``start`` to ``end``."""
    moved = Bytes(alive)
    moved.update(end)
    moved.subtract(start)
    return moved
