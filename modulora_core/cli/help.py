"""Print a command's help: usage, description, examples, and its options in panels."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modulora_core.cli.arguments import LARGEST
from modulora_core.cli.terminal import terminal
from modulora_core.cli.text import continued

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

NAMES_WIDTH = 30
"""Columns of a panel for an option's names; longer ones take several lines."""

EXAMPLE_WIDTH = 78
"""Columns of an example; a longer one continues on the next line."""

FIRST_PANEL = "Options"
"""The panel of every option that has no other."""


def show_help(
    command: Any,
    context: Any,
    panels: Mapping[str, Sequence[str]],
    commands: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> None:
    """Print the help of a click command.

    Args:
        panels: names of parameters by panel title; the others are in :data:`FIRST_PANEL`.
        commands: the name and the line of each command, by panel title.
    """
    from rich.console import Group

    rows = _rows(command, context, panels)
    rows |= commands or {}
    shown = [_panel(title, lines) for title, lines in rows.items() if lines]
    usage = re.sub(r"[{}]", "", context.get_usage())  # typer's marks of required arguments
    terminal().render(Group(usage, "", *_description(command.help), *shown))


def _rows(command: Any, context: Any, panels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Give the names and the help of each parameter, by panel, in the order of ``panels``."""
    parameters = {parameter.name: parameter for parameter in command.get_params(context)}
    listed = {name for names in panels.values() for name in names}
    titles = ["Arguments", *dict.fromkeys([FIRST_PANEL, *panels])]
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
    for title, names in panels.items():
        shown = (parameters[name] for name in names if not _is_hidden(parameters[name]))
        rows[title] = [_row(parameter, context) for parameter in shown]
    for name, parameter in parameters.items():
        if name not in listed and not _is_hidden(parameter):
            title = FIRST_PANEL if parameter.param_type_name == "option" else "Arguments"
            rows[title].append(_row(parameter, context))
    return rows


def _is_hidden(parameter: Any) -> bool:
    return bool(getattr(parameter, "hidden", False))


def _row(parameter: Any, context: Any) -> tuple[str, str]:
    names, help = parameter.get_help_record(context)
    if parameter.param_type_name == "argument":
        names = parameter.metavar or names
    default = parameter.show_default
    help = re.sub(rf"; \d+<=x<={LARGEST}(?=\])", "", help or "")  # it says nothing to a reader
    return names, help.replace(f"[default: ({default})", f"[default: {default}")


def _panel(title: str, lines: list[tuple[str, str]]) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(max_width=NAMES_WIDTH, style="cyan", overflow="fold")
    table.add_column()
    for names, help in lines:
        table.add_row(Text(names), Text(help))
    return Panel(table, title=title, title_align="left", border_style="dim")


def _description(text: str) -> Iterator[Text]:
    """Unwrap the paragraphs of a docstring. Paragraphs with indented lines stay as they are."""
    from rich.text import Text

    for paragraph in inspect.cleandoc(text).split("\n\n"):
        verbatim = "\n " in paragraph
        lines = "\n".join(
            continued(line, EXAMPLE_WIDTH + 2) if line.lstrip().startswith("modulora ") else line
            for line in paragraph.splitlines()
        )
        shown = Text(lines if verbatim else paragraph.replace("\n", " "))
        shown.highlight_regex(r"(?m)^ +modulora (.*\\\n)*.*$", "cyan")
        yield shown
        yield Text("")
