"""What a command shows: its result on stdout, everything else on stderr.

==================  ==================  =========================
                    without ``--json``  with ``--json``
==================  ==================  =========================
the report          text on stdout      one object on stdout
streamed text       stdout              nowhere (it is in the report)
notes, warnings     stderr              stderr
progress, a bar     stderr, if a tty    nowhere
or a line a minute  stderr, if no tty   stderr
==================  ==================  =========================
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from modulora_core.cli.progress import Bar

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, where nothing is cut off at a screen's edge."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a command did.

    Attributes:
        json: the object that ``--json`` prints. Its keys are a promise: add some, rename none. A number that
            isn't finite is printed as null.
        text: what a person reads: a string, which is printed as it is, or something that rich renders.
        exit_code: what the command line ends with: 1 where the work was done and its finding is bad.
    """

    json: Mapping[str, Any]
    text: RenderableType | None = None
    exit_code: int = 0


@dataclass
class Terminal:
    """One run's stdout and stderr. A command gets its own from :func:`terminal`."""

    json: bool = False
    debug: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)

    def note(self, text: str) -> None:
        """Say something on stderr."""
        self._errors.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Say that something is not as expected, though the work goes on."""
        self.note(f"warning: {text}")

    def write(self, text: str) -> None:
        """Stream a piece of the result on stdout, at once and as it is. Nothing under ``--json``."""
        if not self.json:
            self._write(text)

    def progress(self, description: str, *, unit: str, total: int | None = None) -> Bar:
        """A progress bar on stderr with rate and time left, or lines; see :class:`~modulora_core.cli.progress.Bar`."""
        from modulora_core.cli.progress import Bar

        shown = not self.json and self._errors.is_terminal
        return Bar(self._errors, description, unit=unit, total=total, shown=shown)

    def show(self, report: Report) -> None:
        """Print a command's report."""
        if self.json:
            self.write_object(report.json)
        elif isinstance(report.text, str):
            self._write(report.text + "\n")
        elif report.text is not None:
            from rich.console import Console

            width = None if self.stdout.isatty() else PIPED_WIDTH
            console = Console(file=self.stdout, width=width, highlight=False)
            with console.capture() as captured:
                console.print(report.text)
            self._write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def write_object(self, value: Mapping[str, Any]) -> None:
        """Print one JSON object on one line of stdout."""
        self._write(json.dumps(_finite(value), allow_nan=False) + "\n")

    def _write(self, text: str) -> None:
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except BrokenPipeError:
            self._close_quietly()

    def _close_quietly(self) -> NoReturn:
        """Nobody reads any more, as in ``modulora ... | head -1``: end without a word."""
        with suppress(OSError, ValueError):  # a stdout without a file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stdout.fileno())
        raise SystemExit(1)

    @cached_property
    def _errors(self) -> Console:
        from rich.console import Console

        return Console(file=self.stderr, highlight=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """While a command runs: what :func:`terminal` gives, and under ``--json`` the only way to stdout."""
        token = _current.set(self)
        show_warning = warnings.showwarning
        if not self.debug:
            warnings.showwarning = self._show_warning
            # transformers' Trainer imports it where it is installed, and it tells of an optional package each time
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            with _stdout_to_stderr(self.stdout) if self.json else nullcontext():
                yield
        finally:
            warnings.showwarning = show_warning
            _current.reset(token)

    def _show_warning(self, message: Warning | str, *_where: Any, **_more: Any) -> None:
        self.warn(" ".join(str(message).split()))


_current: ContextVar[Terminal] = ContextVar("modulora_terminal")


def terminal() -> Terminal:
    """The terminal of the command that runs; outside of one, the process's stdout and stderr."""
    return _current.get(None) or Terminal()


@contextmanager
def _stdout_to_stderr(stdout: TextIO) -> Iterator[None]:
    """Send to stderr what libraries and child processes print, by Python's object and by file descriptor."""
    stdout.flush()
    try:
        descriptor = stdout.fileno()
        saved = os.dup(descriptor)
        os.dup2(sys.stderr.fileno(), descriptor)
    except (OSError, ValueError):  # not a file, as in a notebook or under a test's capture
        with redirect_stdout(sys.stderr):
            yield
        return
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stdout.flush()  # what was written to the object itself belongs on stderr too
        os.dup2(saved, descriptor)
        os.close(saved)


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON doesn't have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
