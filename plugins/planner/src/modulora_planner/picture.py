"""Draw plans as stacked bars, with matplotlib."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from modulora_core.errors import MissingExtraError, OutputError
from modulora_planner.fitting import MemoryPlan
from modulora_planner.memory import ITEMS

FORMATS = (".svg", ".png", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before any work.

    Raises:
        OutputError: another format, or a folder that does not exist.
        MissingExtraError: matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"plot {path}: expected a name that ends in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"plot {path}: expected an existing folder, and {path.parent} is none")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(f"plot {path}: expected a file that can be written; choose another name")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            f"plot {path}: drawing needs matplotlib; install it: pip install 'modulora-core[plots]'"
        )


def draw(plans: Sequence[MemoryPlan], path: Path) -> None:
    """Draw the jobs of one plan, or the training of several, into ``path``."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    jobs = plans[0].jobs if len(plans) == 1 else {plan.title: plan.training for plan in plans}
    figure = Figure(figsize=(9, 2 + 0.5 * len(jobs)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(jobs)
    for number, (item, title) in enumerate(ITEMS.items()):
        widths = [job.items.get(item, 0) / 2**30 for job in jobs.values()]
        if any(widths):
            axes.barh(list(jobs), widths, left=left, color=colormaps["tab20"](number), label=title)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    if (budget := plans[0].request.budget) is not None:
        axes.axvline(budget / 2**30, color="black", linestyle="--", label="budget")
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.set_title(f"Peak memory of {plans[0].request.model}")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path)
