"""Keep transformers' progress bars, advice and long errors out of our own output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with the next one after a colon; else its type."""
    first, *others = str(error).strip().split("\n", 2)
    if first.endswith(":") and others:
        first = f"{first} {others[0].strip()}"
    return first or type(error).__name__
