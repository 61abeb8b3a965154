"""Report the progress of long work to a callback, or on a bar if a Python program gives none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

from modulora_core.devices.processes import is_first

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` is called as the work goes on."""

Bars = Callable[[str, str], AbstractContextManager[Progress]]
"""``with bars(what, unit) as progress:`` opens a bar. The unit ``"bytes"`` is shown as sizes."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def shows_progress(
    what: str, unit: str
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a function whose keyword ``progress`` is None by default: a bar takes its place.

    Args:
        what: the title of the bar until the function gives another; unit: of its counts.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def shown(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
            if keywords.get("progress") is not None:
                return function(*arguments, **keywords)
            with terminal_bar(what, unit) as progress:
                keywords["progress"] = progress
                return function(*arguments, **keywords)

        return shown

    return decorate


@contextmanager
def terminal_bar(what: str, unit: str) -> Iterator[Progress]:
    """A bar on stderr in the first process, if stderr is a terminal or a notebook, else nothing."""
    from rich.console import Console

    from modulora_core.devices.bar import bar

    console = Console(stderr=True)
    widgets = console.is_jupyter and find_spec("ipywidgets") is not None
    if is_first() and (console.is_terminal or widgets):
        with bar(console, what, unit) as show:
            yield show
    else:
        yield _nothing


def bars(progress: bool | Bars) -> Bars:
    """The function that opens bars: on a terminal, none, or ``progress`` itself."""
    return progress if callable(progress) else terminal_bar if progress else no_bar


@contextmanager
def no_bar(what: str, unit: str) -> Iterator[Progress]:  # noqa: ARG001  # the signature of Bars
    """Show nothing."""
    yield _nothing


def _nothing(*_: Any) -> None:
    pass
