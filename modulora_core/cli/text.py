"""Sizes, counts and tables, as people read and write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Read a size in bytes: ``"24GiB"``, ``"1.5 GB"``, ``"4096"``. GB is 1000³ and GiB is 1024³.

    Raises:
        ValueError: the text isn't a size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower() or "b") if match else None
    if match is None or unit is None:
        raise ValueError(f"expected a size such as 24GiB, 800MB or 4096 (bytes), got {text!r}")
    return int(float(match[1]) * unit)


def format_size(nbytes: float) -> str:
    """Write a size with three or four digits in binary units: ``"1.25 GiB"``, ``"512 B"``."""
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if abs(nbytes) >= 1024**power:
            value = nbytes / 1024**power
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {prefix}iB"
    return f"{nbytes:.0f} B"


def counted(number: int, noun: str) -> str:
    """Write ``"1 tensor"`` or ``"2,048 tensors"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def some(names: Sequence[str], most: int = 3) -> str:
    """Write the first names, and how many there are: ``"a, b, c, ... (7 in all)"``."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names):,} in all)"


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> Table:
    """Make a table without lines. With ``numbers`` all columns but the first align right."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made
