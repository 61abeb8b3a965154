"""Draw a progress bar with rate and time left, with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

Show = Callable[[str, int, int | None], None]
"""A ``Progress`` whose total may be None, for unknown."""


@contextmanager
def bar(console: Console, what: str, unit: str) -> Iterator[Show]:
    """Draw a bar. The unit ``"bytes"`` is shown as sizes."""
    sizes = unit == "bytes"
    whole = Column(no_wrap=True)  # on a narrow terminal the title wraps, and these do not
    drawn = progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=Column()),
        progress.BarColumn(bar_width=12),
        progress.DownloadColumn(table_column=whole)
        if sizes
        else progress.MofNCompleteColumn(table_column=whole),
        progress.TransferSpeedColumn(table_column=whole) if sizes else _Rate(unit, whole),
        progress.TimeRemainingColumn(compact=True, table_column=whole),
        console=console,
    )
    task = drawn.add_task(what, total=None)

    def show(what: str, done: int, total: int | None) -> None:
        if done < drawn.tasks[0].completed:  # other work begins, with its own rate
            drawn.reset(task)
        drawn.update(task, description=what, completed=done, total=total)

    with drawn:
        yield show


class _Rate(progress.ProgressColumn):
    """Show ``12.3 layers/s``."""

    def __init__(self, unit: str, column: Column) -> None:
        super().__init__(column)
        self._unit = unit

    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            "" if speed is None else f"{speed:,.{0 if speed >= 100 else 2}f} {self._unit}/s"
        )
