"""Report the progress of long work to a callback, on a bar, or not at all.

:func:`quiet` keeps transformers' own bars and advice out of our output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import rich.progress
from rich.console import Console, RenderableType
from rich.table import Column
from rich.text import Text

from modulora_core.distributed import is_first

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` is called as the work goes on."""

Show = Callable[[str, int, int | None], None]
"""A ``Progress`` whose total may be None, for unknown."""


@dataclass(frozen=True)
class Bars:
    """Draws a bar for each part of the work.

    Attributes:
        open: ``with open(what, unit) as progress:`` draws a bar. The unit ``"bytes"`` means sizes.
    """

    open: Callable[[str, str], AbstractContextManager[Progress]]


Display = Progress | Bars | bool | None
"""How work shows its progress: by a callback, on bars, on a terminal (True or None), or not at all
(False)."""


def no_progress(*_: object) -> None:
    """Show nothing."""


def shown(display: Display, what: str, unit: str) -> AbstractContextManager[Progress]:
    """Open the callback by which one part of the work shows its progress.

    Args:
        what: the title of a bar until the caller gives another.
        unit: the unit of its counts, such as ``"layers"``.
    """
    if isinstance(display, Bars):
        return display.open(what, unit)
    if display is True or display is None:
        return terminal_bar(what, unit)
    return nullcontext(display or no_progress)


@contextmanager
def terminal_bar(what: str, unit: str) -> Iterator[Progress]:
    """A bar on stderr in the first process, if stderr is a terminal or a notebook, else nothing."""
    console = Console(stderr=True)
    widgets = console.is_jupyter and find_spec("ipywidgets") is not None
    if is_first() and (console.is_terminal or widgets):
        with bar(console, what, unit) as show:
            yield show
    else:
        yield no_progress


@contextmanager
def bar(console: Console, what: str, unit: str) -> Iterator[Show]:
    """Draw a bar. The unit ``"bytes"`` is shown as sizes."""
    sizes = unit == "bytes"
    whole = Column(no_wrap=True)  # on a narrow terminal the title wraps, and these do not
    drawn = rich.progress.Progress(
        rich.progress.SpinnerColumn(),  # it moves while a count doesn't
        rich.progress.TextColumn("{task.description}", markup=False, table_column=Column()),
        *map(
            _Counted,
            (
                rich.progress.BarColumn(bar_width=8),
                rich.progress.DownloadColumn(table_column=whole)
                if sizes
                else rich.progress.MofNCompleteColumn(table_column=whole),
                rich.progress.TransferSpeedColumn(table_column=whole)
                if sizes
                else _Rate(unit, whole),
                rich.progress.TimeRemainingColumn(compact=True, table_column=whole),
            ),
        ),
        console=console,
    )
    task = drawn.add_task(what, total=None)

    def show(what: str, done: int, total: int | None) -> None:
        if done < drawn.tasks[0].completed:  # other work begins, with its own rate
            drawn.reset(task)
        drawn.update(task, description=what, completed=done, total=total)

    with drawn:
        try:
            yield show
            uncounted = drawn.tasks[0].total is None
        except BaseException:
            uncounted = True  # an error's message stands alone
            raise
        finally:
            drawn.update(task, visible=not uncounted)


class _Counted(rich.progress.ProgressColumn):
    """Show a column once there is a count: before, ``0/? bytes`` would say nothing."""

    def __init__(self, column: rich.progress.ProgressColumn) -> None:
        super().__init__(column.get_table_column())
        self._column = column

    def render(self, task: rich.progress.Task) -> RenderableType:
        begun = task.total is not None or task.completed > 0
        return self._column(task) if begun else Text("")


class _Rate(rich.progress.ProgressColumn):
    """Show ``12.3 layers/s``."""

    def __init__(self, unit: str, column: Column) -> None:
        super().__init__(column)
        self._unit = unit

    def render(self, task: rich.progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            "" if speed is None else f"{speed:,.{0 if speed >= 100 else 2}f} {self._unit}/s"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers log errors only and draw no progress bars within this block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
