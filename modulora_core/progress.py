"""Report the progress of long work to a callback, on a bar, or not at all.

:func:`quiet` keeps transformers' own bars and advice out of our output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Literal

import rich.progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from modulora_core.distributed import is_first

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` is called as the work goes on."""

Show = Callable[[str, int, int | None], None]
"""A ``Progress`` whose total may be None, for unknown."""

Bars = Callable[[str, str], AbstractContextManager[Progress]]
"""``with bars(what, unit) as progress:`` opens a bar. The unit ``"bytes"`` is shown as sizes."""


def no_progress(*_: object) -> None:
    """Show nothing."""


def shown(
    progress: Progress | Literal[False] | None, what: str, unit: str
) -> AbstractContextManager[Progress]:
    """Give ``progress`` itself, a bar on a terminal for None, and :func:`no_progress` for False.

    Args:
        what: the title of the bar until the caller gives another; unit: of its counts.
    """
    if progress is None:
        return terminal_bar(what, unit)
    return nullcontext(progress or no_progress)


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


def bars(progress: bool | Bars) -> Bars:
    """The function that opens bars: on a terminal, none, or ``progress`` itself."""
    return progress if callable(progress) else terminal_bar if progress else no_bar


@contextmanager
def no_bar(what: str, unit: str) -> Iterator[Progress]:  # noqa: ARG001  # the signature of Bars
    """Show nothing."""
    yield no_progress


@contextmanager
def bar(console: Console, what: str, unit: str) -> Iterator[Show]:
    """Draw a bar. The unit ``"bytes"`` is shown as sizes."""
    sizes = unit == "bytes"
    whole = Column(no_wrap=True)  # on a narrow terminal the title wraps, and these do not
    drawn = rich.progress.Progress(
        rich.progress.SpinnerColumn(),  # it moves while a count doesn't
        rich.progress.TextColumn("{task.description}", markup=False, table_column=Column()),
        rich.progress.BarColumn(bar_width=8),
        rich.progress.DownloadColumn(table_column=whole)
        if sizes
        else rich.progress.MofNCompleteColumn(table_column=whole),
        rich.progress.TransferSpeedColumn(table_column=whole) if sizes else _Rate(unit, whole),
        rich.progress.TimeRemainingColumn(compact=True, table_column=whole),
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
