"""The plots of the page as plain values: where dots and bars are, in percent of a track's width. The template draws them.

Percent, so that a plot is as wide as the screen and its text stays as large as the page's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modulora_conformance.report.numbers import duration, measured_text, quantity, share_text
from modulora_conformance.report.reading import Check, Measured, Run

MARKERS = 6
"""How many shapes, each with its color, tell configurations apart; more configurations share them."""

_LEFT, _RIGHT = 12.0, 93.0
"""Where the logarithmic part of a track begins and ends: left of it is what is exactly 0, right of it what isn't finite."""

_LANE = 30.0
"""Between the marks of two configurations, in percent of a row's height."""

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_BAR_LIMIT = 75.0
"""Where the limit of a bar is, unless a bar is so long that it must be nearer."""


@dataclass(frozen=True, slots=True)
class Dot:
    """One value: ``x`` and ``y`` in percent of the track, the marker of its configuration, what it says when it is pointed at."""

    x: float
    y: float
    marker: int
    text: str
    over: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a plot: what is left of it, its dots, what is right of it."""

    label: str
    tag: str
    dots: tuple[Dot, ...]
    value: str
    over: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """Rows over one logarithmic axis. ``ticks`` are positions and labels; ``limit`` is where 1 is."""

    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]
    limit: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One value beside its limit: both in percent of the track."""

    label: str
    tag: str
    width: float
    limit: float
    value: str
    over: bool


@dataclass(frozen=True, slots=True)
class _Axis:
    """Powers of ten from ``low`` to ``high``."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Iterable[float], *, low: int, high: int) -> _Axis:
        """One that has 1, all ``values`` within reason, and at least ``10**low`` to ``10**high``."""
        logs = [math.log10(value) for value in values if 0 < value < math.inf]
        first = min([low, *(math.floor(x) for x in logs)])
        last = max([high, *(math.ceil(x) for x in logs)])
        return cls(max(first, -9), min(last, 6))

    def x(self, value: float) -> float:
        if value == 0:
            return _LEFT / 3
        if not math.isfinite(value):
            return (100 + _RIGHT) / 2
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(_LEFT + min(max(share, 0.0), 1.0) * (_RIGHT - _LEFT), 2)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        step = math.ceil((self.high - self.low) / 6)
        return tuple(
            (self.x(10.0**p), _power(p)) for p in range(self.low, self.high + 1) if p % step == 0
        )


def _power(p: int) -> str:
    """``"0.01"``, ``"100"``, and beyond that ``"10⁻⁶"``."""
    return f"{10.0**p:g}" if abs(p) < 3 else "10" + str(p).translate(_SUPERSCRIPT)


def markers(run: Run) -> Mapping[str, int]:
    """The marker of each configuration."""
    return {name: i % MARKERS for i, name in enumerate(run.configurations)}


def _lanes(run: Run) -> Mapping[str, tuple[float, int]]:
    """How high in a row a configuration's marks are, in percent, and their marker: equal values of several stay apart."""
    count = len(run.configurations)
    step = min(_LANE, 2 * _LANE / max(1, count - 1))
    chosen = markers(run)
    return {
        name: (round(50 + step * (i - (count - 1) / 2), 1), chosen[name])
        for i, name in enumerate(run.configurations)
    }


def error_plot(run: Run) -> Plot | None:
    """Errors as shares of their tolerances, a row for each check. None where nothing was measured."""
    by_check: dict[tuple[str, str], list[tuple[Check, Measured]]] = {}
    for check, found in run.measured("relative"):
        by_check.setdefault((check.level, check.sentence), []).append((check, found))
    if not by_check:
        return None
    axis = _Axis.over((found.share for _, found in run.measured("relative")), low=-3, high=1)
    lanes = _lanes(run)
    rows = tuple(
        _error_row(level, label, items, axis, lanes)
        for (level, label), items in sorted(by_check.items(), key=_level)
    )
    return Plot(rows, axis.ticks, axis.x(1.0))


def _level(item: tuple[tuple[str, str], object]) -> str:
    return item[0][0]


def _error_row(
    level: str,
    label: str,
    items: Sequence[tuple[Check, Measured]],
    axis: _Axis,
    lanes: Mapping[str, tuple[float, int]],
) -> Row:
    dots = tuple(
        Dot(axis.x(found.share), *lanes[check.configuration], _said(check, found), found.share > 1)
        for check, found in items
    )
    worst = max(found.share for _, found in items)
    return Row(label, level, dots, share_text(worst), worst > 1)


def _said(check: Check, found: Measured) -> str:
    where = ", ".join(filter(None, (check.configuration, check.case)))
    return f"{where}: {measured_text(found)} ({share_text(found.share)} of it)"


def speed_plot(run: Run) -> Plot | None:
    """How many times as fast as dense, a row for each comparison. None where speed wasn't measured."""
    timings = [
        (name, timing)
        for name, speed in run.speed.items()
        if name in run.configurations
        for timing in speed.timings
    ]
    if not timings:
        return None
    axis = _Axis.over((timing.speed for _, timing in timings), low=-1, high=1)
    lanes = _lanes(run)
    rows = []
    for label in dict.fromkeys(timing.name for _, timing in timings):
        items = [(name, timing) for name, timing in timings if timing.name == label]
        dots = tuple(
            Dot(axis.x(t.speed), *lanes[name],
                f"{name}: {duration(t.seconds)}, dense {duration(t.dense_seconds)}: {t.speed:.2g} times as fast", over=False)
            for name, t in items
        )  # fmt: skip
        speeds = sorted(t.speed for _, t in items)
        value = (
            f"{speeds[0]:.2g} ×" if len(speeds) == 1 else f"{speeds[0]:.2g} to {speeds[-1]:.2g} ×"
        )
        rows.append(Row(label, "", dots, value, over=False))
    return Plot(tuple(rows), axis.ticks, axis.x(1.0))


def memory_bars(run: Run) -> tuple[Bar, ...]:
    """The worst of each measurement in bytes, for each configuration, beside its limit."""
    worst: dict[tuple[str, str], Measured] = {}
    for check, found in run.measured("bytes"):
        key = found.name, check.configuration
        if key not in worst or found.share > worst[key].share:
            worst[key] = found
    longest = max((min(found.share, 4.0) for found in worst.values()), default=1.0)
    limit = min(_BAR_LIMIT, 98 / max(longest, 1e-9))
    return tuple(
        Bar(name, configuration, round(min(found.share, 4.0) * limit, 2), round(limit, 2),
            f"{quantity(found.value, 'bytes')} of {quantity(found.limit, 'bytes')}, {_bytes_share(found)}", found.share > 1)
        for (name, configuration), found in sorted(worst.items(), key=lambda item: item[0][0])
    )  # fmt: skip


def _bytes_share(found: Measured) -> str:
    return share_text(found.share) if found.share else "0%"  # no bytes aren't an exact result
