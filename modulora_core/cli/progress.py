"""Progress of long work where nobody watches a bar: a line now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console

from modulora_core.cli.text import format_size
from modulora_core.progress import Show

SECONDS_BETWEEN_LINES = 60


@contextmanager
def lines(console: Console, unit: str) -> Iterator[Show]:
    """Print ``quantizing: 12/210 layers`` at most once a minute."""
    last = monotonic()

    def show(what: str, done: int, total: int | None) -> None:
        nonlocal last
        if monotonic() - last < SECONDS_BETWEEN_LINES:
            return
        last = monotonic()
        write = format_size if unit == "bytes" else str
        counts = write(done) if total is None else f"{write(done)}/{write(total)}"
        counts += "" if unit == "bytes" else f" {unit}"
        console.print(f"{what}: {counts}", markup=False, highlight=False, soft_wrap=True)

    yield show
