"""Draw the curves of a run as inline SVG, which needs no library and no script.

The page's style sheet colors the classes: ``first`` and ``second`` are lines, ``grid`` the axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

Points = Sequence[tuple[float, float]]
"""Step and value, in the order of the steps."""

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 24
_MOST_POINTS = 300


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart of one or two series over the steps.

    Attributes:
        title: the title, with the unit of the values.
        series: the points by name.
        from_zero: the vertical axis begins at zero.
        labels: the label of each point of the first series.
        axis: the name of the horizontal axis in tooltips.
        joined: a line joins the points of a series.
    """

    title: str
    series: Mapping[str, Points]
    from_zero: bool = False
    labels: Sequence[str] = ()
    axis: str = "step"
    joined: bool = True

    @property
    def svg(self) -> str:
        """The chart as an SVG element."""
        shown = {name: _thinned(points) for name, points in self.series.items()}
        values = [value for points in shown.values() for _, value in points]
        steps = [step for points in shown.values() for step, _ in points]
        ticks = _ticks(0 if self.from_zero else min(values), max(values))
        right = max(*steps, min(steps) + 1)

        def place(step: float, value: float) -> tuple[float, float]:
            x = (step - min(steps)) / (right - min(steps))
            y = (value - ticks[0]) / (ticks[-1] - ticks[0])
            return (
                round(_LEFT + x * (_WIDTH - _LEFT - _RIGHT), 1),
                round(_HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM), 1),
            )

        parts = []
        for tick in ticks:
            _, y = place(right, tick)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            )
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
        for step, anchor in ((min(steps), "start"), (max(steps), "end")):
            x, _ = place(step, ticks[0])
            parts.append(f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{step:g}</text>')
        for kind, points in zip(("first", "second"), shown.values(), strict=False):
            places = [place(*point) for point in points]
            line = " ".join(f"{x},{y}" for x, y in places)
            if self.joined:
                parts.append(f'<polyline class="{kind}" points="{line}"/>')
            if len(points) <= 40:
                parts += [
                    f'<circle class="{kind}" cx="{x}" cy="{y}" r="2.5">'
                    f"<title>{self.axis} {step:g}: {value:.4g}</title></circle>"
                    for (x, y), (step, value) in zip(places, points, strict=True)
                ]
        for label, point in zip(self.labels, next(iter(shown.values())), strict=False):
            x, y = place(*point)
            side, shift = ("end", -6) if x > _WIDTH / 2 else ("start", 6)
            text = escape(label)
            parts.append(f'<text x="{x + shift}" y="{y - 6}" text-anchor="{side}">{text}</text>')
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def curves(history: Sequence[Mapping[str, float]]) -> list[Curve]:
    """The charts of Trainer's ``log_history``; a chart without points is left out."""

    def points(key: str, scale: float = 1) -> Points:
        found = [(entry["step"], entry[key] * scale) for entry in history if key in entry]
        return [(step, value) for step, value in found if math.isfinite(value)]

    charts = {
        "Loss": {"training": points("loss"), "evaluation": points("eval_loss")},
        "Reward margin": {
            "training": points("rewards/margins"),
            "evaluation": points("eval_rewards/margins"),
        },
        "Learning rate": {"": points("learning_rate")},
        "Gradient norm": {"": points("grad_norm")},
        "Throughput, tokens/s": {"": points("tokens_per_second")},
        "Peak memory, GiB": {"": points("memory_bytes", 1 / 2**30)},
    }
    present = (
        Curve(title, {name: found for name, found in series.items() if found}, "" in series)
        for title, series in charts.items()
    )
    return [curve for curve in present if curve.series]


def _thinned(points: Points) -> Points:
    """At most 300 points: each is the mean of several in a row, at the last one's step."""
    size = math.ceil(len(points) / _MOST_POINTS)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], fmean(value for _, value in run)) for run in runs]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose the values: three to six, from 1, 2 or 5 times a power of ten."""
    if high - low < 1e-3 * abs(high):  # a level line in the middle of its chart
        low, high = low - 0.05 * abs(high), high + 0.05 * abs(high)
    if low == high:  # zeros
        high = low + 1
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
