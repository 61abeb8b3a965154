"""A plan as a picture: a bar for each job, cut into its items.

SVG is written here, with no library. Other formats are drawn by matplotlib, where it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from modulora_core.errors import MissingExtraError, OutputError
from modulora_core.planner.fitting import MemoryPlan
from modulora_core.planner.jobs import ITEMS, Job

COLOURS = dict(zip(ITEMS, ("#1b4f72", "#2e86c1", "#85c1e9", "#d4e6f1", "#b03a2e", "#e67e22", "#f5b041", "#1e8449", "#58d68d",
                           "#7d3c98", "#148f77", "#5d6d7e", "#a569bd", "#ccd1d1", "#95a5a6"), strict=True))  # fmt: skip

_FORMATS = (".svg", ".png", ".pdf")
_WIDTH, _BAR, _LEFT, _LINE = 720, 34, 190, 20
_GIB = 2**30

Bar = tuple[str, Job]


def check_picture(path: Path) -> None:
    """Refuse a picture that can't be drawn, before any work.

    Raises:
        OutputError: another format, or a folder that isn't there. MissingExtraError: it takes matplotlib.
    """
    if path.suffix.lower() not in _FORMATS:
        raise OutputError(f"plot {path}: expected a name that ends in {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"plot {path}: expected an existing folder, and {path.parent} is none")
    if path.suffix.lower() != ".svg":
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise MissingExtraError(f"plot {path}: this format needs matplotlib, which is missing; pip install matplotlib, or name "
                                    f"the file {path.with_suffix('.svg').name}") from None  # fmt: skip


def draw(plans: Sequence[MemoryPlan], path: Path) -> None:
    """Draw one plan's jobs, or the training of several plans, into ``path``."""
    bars = (
        list(plans[0].jobs.items())
        if len(plans) == 1
        else [(titled(plan), plan.training) for plan in plans]
    )
    budget = plans[0].request.budget
    if path.suffix.lower() == ".svg":
        path.write_text(svg(bars, plans[0].request.model, budget), "utf-8")
    else:
        _by_matplotlib(bars, plans[0].request.model, budget, path)


def titled(plan: MemoryPlan) -> str:
    """The quantizer and those options that tell configurations apart."""
    options = ", ".join(f"{name}={value}" for name, value in plan.request.options.items())
    return f"{plan.quantizer} {options}".rstrip()


def svg(bars: Sequence[Bar], title: str, budget: int | None) -> str:
    """The picture as SVG: a bar a line, a legend of the items that are in it, and the budget as a line across."""
    used = [name for name in ITEMS if any(name in job.items for _, job in bars)]
    most = max(budget or 0, *(job.nbytes for _, job in bars)) or 1
    scale = (_WIDTH - _LEFT - 90) / most
    bottom = 50 + len(bars) * (_BAR + 12)
    height = bottom + _LINE * -(-len(used) // 2) + 30
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>', _text(12, 26, f"Peak memory of {title}, GiB", 16)]  # fmt: skip
    for number, (name, job) in enumerate(bars):
        parts += _bar(name, job, 44 + number * (_BAR + 12), scale)
    if budget is not None:
        x = _LEFT + budget * scale
        parts += [f'<line x1="{x:.1f}" y1="36" x2="{x:.1f}" y2="{bottom - 4}" stroke="black" stroke-dasharray="5 4"/>',
                  _text(x - 40, 34, f"budget {budget / _GIB:.2f}")]  # fmt: skip
    for number, item in enumerate(used):
        x, y = 12 + number % 2 * 350, bottom + 20 + number // 2 * _LINE
        parts += [
            f'<rect x="{x}" y="{y - 11}" width="13" height="13" fill="{COLOURS[item]}"/>',
            _text(x + 20, y, ITEMS[item]),
        ]
    return "\n".join([*parts, "</svg>\n"])


def _bar(name: str, job: Job, y: int, scale: float) -> list[str]:
    parts = [_text(12, y + 22, name)]
    x = float(_LEFT)
    for item, nbytes in job.items.items():
        width = nbytes * scale
        tip = f"<title>{escape(ITEMS[item])}: {nbytes / _GIB:.3f} GiB</title>"
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}" fill="{COLOURS[item]}">{tip}</rect>'
        )
        x += width
    return [*parts, _text(x + 6, y + 22, f"{job.nbytes / _GIB:.2f}")]


def _text(x: float, y: float, text: str, size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'


def _by_matplotlib(bars: Sequence[Bar], title: str, budget: int | None, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _ in bars]
    left = [0.0] * len(bars)
    for item in ITEMS:
        widths = [job.items.get(item, 0) / _GIB for _, job in bars]
        if any(widths):
            axes.barh(names, widths, left=left, color=COLOURS[item], label=ITEMS[item])
            left = [start + width for start, width in zip(left, widths, strict=True)]
    if budget is not None:
        axes.axvline(budget / _GIB, color="black", linestyle="--", label="budget")
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.set_title(f"Peak memory of {title}")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path)
