"""Print a command's result on stdout and everything else on stderr.

==================  ==================  =========================
                    without ``--json``  with ``--json``
==================  ==================  =========================
the report          text on stdout      one object on stdout
streamed text       stdout              nowhere: the report has it
notes, warnings     stderr              stderr
progress, a bar     stderr, if a tty    stderr, if a tty
or a line a minute  stderr, if no tty   stderr, if no tty
==================  ==================  =========================
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from modulora_core.cli.text import WordWrap, continued, visible
from modulora_core.errors import WorkError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from modulora_core.progress import Show

_STYLES = re.compile("\x1b\\[[0-9;]*m")
"""The escape codes of colors and styles."""

PIPED_WIDTH = 160
"""Columns of a table in a file or a pipe, so that nothing is cut off."""


def open_streams() -> None:
    """Make stdout and stderr take any text, in any encoding; a closed one drops it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a command.

    Attributes:
        json: the object of ``--json``. Its keys are a promise: add some, rename none. NaN and
            infinities are printed as null.
        text: for people: a string, printed unchanged, or something that rich renders.
        exit_code: 1 if the work was done and found something bad.
    """

    json: Mapping[str, Any]
    text: RenderableType | None = None
    exit_code: int = 0


@dataclass
class Terminal:
    """The stdout and stderr of one run. A command gets its own from :func:`terminal`.

    In a distributed run all processes but the first are ``silent``.
    """

    json: bool = False
    debug: bool = False
    silent: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    _spinner: Live | None = field(default=None, init=False)
    _doing: str = field(default="working", init=False)
    _words: WordWrap = field(default_factory=WordWrap, init=False)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Turn a spinner on a terminal while there is neither a bar nor output.

        Imports take seconds, and so does what comes between two bars.
        """
        if self.silent or self._spinner is not None or not self.stderr.isatty():
            yield
            return
        self._spin()
        try:
            yield
        finally:
            self.stop_working()

    def _spin(self) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        # libraries keep the stderr that they find at their import, so it is not replaced
        self._spinner = Live(
            Spinner("dots", self._doing), console=self._errors, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._spinner.start(refresh=True)

    def doing(self, what: str) -> None:
        """Say beside the spinner what the command does now."""
        self._doing = what
        if self._spinner is not None:
            from rich.spinner import Spinner

            self._spinner.update(Spinner("dots", what))

    def stop_working(self) -> bool:
        """End the spinner, and return whether it turned: other text begins on its line."""
        spinner, self._spinner = self._spinner, None
        if spinner is not None:
            spinner.stop()
        return spinner is not None

    def note(self, text: str) -> None:
        """Print a line on stderr, if it can be written. A terminal wraps words, not commands."""
        if not self.silent:
            wraps, text = self._errors.is_terminal, visible(text)
            if wraps and text.lstrip().startswith("$"):
                wraps, text = False, continued(text, self._errors.width)
            with suppress(OSError):
                self._errors.print(text, markup=False, highlight=False, soft_wrap=not wraps)

    def write(self, text: str) -> None:
        """Stream a piece of the result to stdout. With ``--json`` nothing is printed.

        On a terminal lines break between words, so a word is printed once whitespace follows it.
        """
        if not self.json:
            text = visible(text)
            self._write(self._words.wrap(text) if self.stdout.isatty() else text)

    def progress(self, what: str, unit: str) -> AbstractContextManager[Show]:
        """Show progress on stderr: ``with terminal().progress("packing", "layers") as show:``.

        ``show(what, done, total)`` is a progress callback as the work takes it.
        """
        from modulora_core.cli.progress import lines
        from modulora_core.progress import bar

        if self.silent:
            return nullcontext(lambda *_: None)
        if not self._errors.is_terminal:
            return lines(self._errors, unit)
        return self._alone(bar(self._errors, what, unit))

    @contextmanager
    def _alone(self, shown: AbstractContextManager[Show]) -> Iterator[Show]:
        """Put a bar into the place of the spinner, which turns again afterwards."""
        turned = self.stop_working()
        with shown as show:
            yield show
        if turned:
            self._spin()

    def show(self, report: Report) -> None:
        """Print a command's report."""
        if self.json:
            self.write_object(report.json)
        elif isinstance(report.text, str):
            self._write(visible(report.text) + "\n")
        elif report.text is not None:
            self.render(report.text, None if self.stdout.isatty() else PIPED_WIDTH)

    def render(self, renderable: RenderableType, width: int | None = None) -> None:
        """Print on stdout something that rich renders, without spaces at the ends of lines."""
        from rich.console import Console

        console = Console(file=self.stdout, width=width, highlight=False, emoji=False)
        with console.capture() as captured:
            console.print(renderable, crop=False)  # a command may be long
        self._write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def write_object(self, value: Mapping[str, Any]) -> None:
        """Print one JSON object on one line of stdout."""
        self._write(json.dumps(_finite(value), allow_nan=False) + "\n")

    def _write(self, text: str) -> None:
        if self.silent:
            return
        self.stop_working()
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except BrokenPipeError:
            self._close_quietly()
        except OSError as error:
            raise WorkError(f"standard output: {error.strerror or error}") from error

    def _close_quietly(self) -> NoReturn:
        """End without a message, because nobody reads any more: ``modulora ... | head -1``."""
        with suppress(OSError, ValueError):  # a stdout without a file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stdout.fileno())
        raise SystemExit(1)

    @cached_property
    def _errors(self) -> Console:
        from rich.console import Console

        return Console(file=self.stderr, highlight=False, emoji=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the terminal of :func:`terminal`, and of libraries' warnings.

        Libraries' text on stderr has no control characters, which may come from a file. With
        ``--json`` nothing else reaches stdout meanwhile.
        """
        token = _current.set(self)
        show_warning, logged = warnings.showwarning, _Logged(self)
        logging.getLogger().addHandler(logged)
        ours = logging.getLogger("modulora_core")
        level = ours.level
        ours.setLevel(logging.INFO)
        if self.silent:
            logging.disable(logging.WARNING)
        if not self.debug:
            warnings.showwarning = self._show_warning
            # the Trainer imports it, and it logs a missing optional package each time
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            out = _stdout_to_stderr(self.stdout) if self.json else nullcontext()
            with redirect_stderr(cast("TextIO", _Escaped(self))), out:
                yield
        finally:
            warnings.showwarning = show_warning
            logging.getLogger().removeHandler(logged)
            ours.setLevel(level)
            logging.disable(logging.NOTSET)
            _current.reset(token)

    def _show_warning(self, message: Warning | str, *_where: Any, **_more: Any) -> None:
        self.note(f"warning: {' '.join(str(message).split())}")


class _Logged(logging.Handler):
    """Notes our log records, and the warnings of loggers that have no handler of their own."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.INFO)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        if _has_handler(record.name):
            return
        text = " ".join(_STYLES.sub("", record.getMessage()).split())
        if record.levelno >= logging.WARNING:
            self._terminal.note(f"{record.levelname.lower()}: {text}")
        elif record.name.startswith("modulora"):
            self._terminal.note(text)


def _has_handler(name: str) -> bool:
    """Whether a logger below the root prints the records of the logger ``name`` itself."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger is not logging.getLogger():
        if any(not isinstance(each, logging.NullHandler) for each in logger.handlers):
            return True
        logger = logger.parent
    return False


class _Escaped:
    """A stderr for libraries: their handlers and bars print without styles, and without control
    characters but CR."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._stream = terminal, terminal.stderr

    def write(self, text: str) -> int:
        self._terminal.stop_working()
        plain = _STYLES.sub("", text)
        self._stream.write("\r".join(map(visible, plain.split("\r"))))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_current: ContextVar[Terminal] = ContextVar("modulora_terminal")


def terminal() -> Terminal:
    """Give the running command's terminal; without one, the process's stdout and stderr."""
    return _current.get(None) or Terminal()


@contextmanager
def _stdout_to_stderr(stdout: TextIO) -> Iterator[None]:
    """Send to stderr whatever libraries print, through Python or through the file descriptor."""
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
        stdout.flush()  # text written to the object itself belongs on stderr too
        os.dup2(saved, descriptor)
        os.close(saved)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
