"""A progress bar with rate and time left; where nobody watches, a line now and then."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from modulora_core.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task

SECONDS_BETWEEN_LINES = 60
"""Of work that isn't shown as a bar: what takes no longer than this says nothing of its progress."""


class Bar:
    """Progress of one piece of work, a context manager::

        with terminal().progress("quantizing", unit="layers", total=210) as bar:
            for layer in layers:
                ...
                bar.advance()

    Where the work counts for itself, hand it :meth:`update` as its callback. The unit ``"bytes"`` is shown as sizes. A bar that isn't
    ``shown`` prints a plain line at most once a minute instead: ``quantizing: 12/210 layers``.
    """

    def __init__(
        self, console: Console, description: str, *, unit: str, total: int | None, shown: bool
    ) -> None:
        sizes = unit == "bytes"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn() if sizes else MofNCompleteColumn(),
            TransferSpeedColumn() if sizes else _RateColumn(unit),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not shown,
        )
        self._task = self._progress.add_task(description, total=total)
        self._console, self._unit, self._shown = console, unit, shown
        self._last_line = monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._progress.advance(self._task, count)
        self._say()

    def update(self, done: int, total: int | None = None, description: str | None = None) -> None:
        """``done`` of ``total`` are done; None leaves the total or the description as it is.

        Fewer than before are of another piece of work: rate and time left are its own.
        """
        if done < self._progress.tasks[0].completed:
            self._progress.reset(self._task)
        self._progress.update(self._task, completed=done, total=total, description=description)
        self._say()

    def _say(self) -> None:
        if self._shown or monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = monotonic()
        task = self._progress.tasks[0]
        numbers = [task.completed] if task.total is None else [task.completed, task.total]
        if self._unit == "bytes":
            done = "/".join(format_size(number) for number in numbers)
        else:
            done = "/".join(f"{number:.0f}" for number in numbers) + f" {self._unit}"
        self._console.print(
            f"{task.description}: {done}", markup=False, highlight=False, soft_wrap=True
        )


class _RateColumn(ProgressColumn):
    """``12.3 layers/s``."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            "" if speed is None else f"{speed:,.{0 if speed >= 100 else 2}f} {self._unit}/s"
        )
