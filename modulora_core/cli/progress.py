"""A progress bar with rate and time left."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task


class Bar:
    """Progress of one piece of work, a context manager::

        with terminal().progress("quantizing", unit="layers", total=210) as bar:
            for layer in layers:
                ...
                bar.advance()

    Where the work counts for itself, hand it :meth:`update` as its callback. The unit ``"bytes"`` is shown as sizes.
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

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._progress.advance(self._task, count)

    def update(self, done: int, total: int | None = None, description: str | None = None) -> None:
        """``done`` of ``total`` are done; None leaves the total or the description as it is.

        Fewer than before are of another piece of work: rate and time left are its own.
        """
        if done < self._progress.tasks[0].completed:
            self._progress.reset(self._task)
        self._progress.update(self._task, completed=done, total=total, description=description)


class _RateColumn(ProgressColumn):
    """``12.3 layers/s``."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.{0 if speed >= 100 else 2}f} {self._unit}/s")
