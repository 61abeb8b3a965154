"""Sizes, counts and tables, as people read and write them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

_UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

_CONTROL = re.compile(r"[^\n\t -~\u00a0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")
"""Characters that move the cursor, set colors, turn the order of writing, or can't be written."""


_SHELL_WORD = re.compile(r"""\s*(?:'[^']*'|"[^"]*"|[^\s'"])+""")
"""A word of a command, with its quotes, and the space before it."""

_BREAK = r"(\s|[\u0e00-\U0010ffff])"
"""A line may break at whitespace, and at the characters of scripts without spaces."""


def visible(text: str) -> str:
    """Escape control characters as Python does, so that no file commands a terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class WordWrap:
    """Breaks streamed text between words, at the width of the terminal."""

    def __init__(self) -> None:
        self._word, self._column = "", 0  # a word that may go on, and the cells before it

    def wrap(self, text: str) -> str:
        """The text that is ready to print: all but its last word, if none of ``_BREAK`` follows."""
        from rich.cells import cell_len

        width, ready = shutil.get_terminal_size().columns, []
        *parts, self._word = re.split(_BREAK, self._word + text)
        for part in parts:  # words, which may be empty, and single characters by turns
            length = cell_len(part)
            if part == "\n":
                self._column = -length
            elif self._column + length > width:
                if part.isspace():  # the next word begins a line
                    continue
                ready.append("\n" if self._column else "")
                self._column = 0
            ready.append(part)
            self._column += length
        return "".join(ready)


def parse_size(text: str) -> int:
    """Read a size in bytes: ``"24GiB"``, ``"1.5 GB"``, ``"4096"``. GB is 1000³ and GiB is 1024³.

    Raises:
        ValueError: the text isn't a size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower() or "b") if match else None
    if match is None or unit is None:
        raise ValueError(f"expected a size such as 24GiB, 800MB or 4096 (bytes), got {text!r}")
    if len(match[1]) > 30:
        raise ValueError(f"expected a size of at most 30 digits, got {len(match[1])}")
    return int(float(match[1]) * unit)


def size_flag(nbytes: int) -> str:
    """Write a size as :func:`parse_size` reads it, exactly: ``"24GiB"``, ``"1500000"``."""
    units = sorted(((size, unit) for unit, size in _UNITS.items()), reverse=True)
    size, unit = next((size, unit) for size, unit in units if nbytes % size == 0)
    name = unit.upper().replace("IB", "iB") if size > 1 else ""
    return f"{nbytes // size}{name}"


def format_size(nbytes: float) -> str:
    """Write a size with three or four digits in binary units: ``"1.25 GiB"``, ``"512 B"``."""
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if abs(nbytes) >= 1024**power:
            value = nbytes / 1024**power
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {prefix}iB"
    return f"{nbytes:.0f} B"


def facts(found: Mapping[str, Any]) -> Table:
    """Make a row for each entry of a report's object: ``peak memory   1.25 GiB``.

    Empty entries have no row. Keys that end in ``bytes`` have sizes.
    """
    rows = [(_title(key), _value(key, value)) for key, value in found.items()]
    made = table(("", ""), [row for row in rows if row[1]])
    made.show_header = False
    return made


def _title(key: str) -> str:
    title = {"bytes": "size", "kept": "kept dense"}.get(key, key)
    return title.removesuffix("_bytes").replace("_", " ")


def _value(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        if any(isinstance(part, list) for part in value.values()):
            return "; ".join(f"{_names(part)} ({name})" for name, part in value.items())
        given = {name: part for name, part in value.items() if part is not None}
        return ", ".join(f"{name}={_value(name, part)}" for name, part in given.items())
    if isinstance(value, (list, tuple)):
        shown = [_value(key, part) for part in value]
        return ", ".join(shown[:3]) + (f", ... ({len(shown):,} in all)" if shown[3:] else "")
    if isinstance(value, int) and key.endswith("bytes"):
        return format_size(value)
    if isinstance(value, float):
        return f"{value:,.5g}"
    return f"{value:,}" if type(value) is int else "" if value is None else str(value)


def _names(found: Sequence[str]) -> str:
    return ", ".join(found) if len(found) < 3 else f"{len(found):,} tensors"


def next_commands(*commands: str) -> RenderableType:
    """The lines that end a report: the commands that a user may type now, each on a line."""
    return ToPaste("\nNext: " + "\n  or: ".join(commands))


@dataclass(frozen=True)
class ToPaste:
    """Lines with commands. On a terminal a long one is continued as a shell takes it."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for line in visible(self.text).split("\n"):
            shown = continued(line, options.max_width) if console.is_terminal else line
            yield Text(shown, no_wrap=True, overflow="ignore")


def continued(command: str, width: int) -> str:
    """A command on lines of at most ``width`` columns, broken between words by backslashes."""
    lines = [""]
    for word in _SHELL_WORD.findall(command):
        if lines[-1].strip() and len(lines[-1] + word) > width - 2:
            lines.append(" " * 8 + word.lstrip())
        else:
            lines[-1] += word
    return " \\\n".join(lines)


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
        made.add_row(*(Text(visible(cell)) for cell in row))
    return made
