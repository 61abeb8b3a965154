"""Print a command's help: usage, text, and its options in rich's panels."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modulora_core.cli.terminal import terminal
from modulora_core.cli.text import continued

WIDTH = 80
"""Columns of an example; a longer one continues on the next line."""

NAMES_WIDTH = 30
"""Columns of a panel for an option's names; longer ones take several lines."""


def show_help(
    command: Any,
    context: Any,
    panels: Mapping[str, Sequence[str]],
    commands: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> None:
    """Print the help of a click command.

    Args:
        panels: names of parameters by panel title; the others are in ``Arguments`` or ``Options``.
        commands: the name and the line of each command, by panel title.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    parameters = {each.name: each for each in command.get_params(context)}
    titles = {name: title for title, names in panels.items() for name in names}
    rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for name in (*titles, *(name for name in parameters if name not in titles)):
        if not getattr(parameters[name], "hidden", False):
            kind = f"{parameters[name].param_type_name.title()}s"
            names, help = parameters[name].get_help_record(context)
            if kind == "Arguments":
                names = parameters[name].metavar or names
            help = re.sub(r"\[default: \((.+)\)", r"[default: \1", help)  # typer's parentheses
            rows.setdefault(titles.get(name, kind), []).append((names, help))
    shown = []
    for title, lines in {**rows, **(commands or {})}.items():
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(max_width=NAMES_WIDTH, style="cyan", overflow="fold")
        for line in lines:
            table.add_row(*map(Text, line))
        shown += [Panel(table, title=title, title_align="left", border_style="dim")] * bool(lines)
    text = inspect.cleandoc(command.help or "").split("\n\n")
    # a paragraph without indented lines wraps anew
    prose = "\n\n".join(p if "\n " in p else p.replace("\n", " ") for p in text)
    examples = re.compile(r"^    modulora .*", re.MULTILINE)
    prose = examples.sub(lambda found: continued(found[0], WIDTH), prose)
    usage = re.sub(r"[{}]", "", context.get_usage())  # typer's marks of required arguments
    terminal().render(Group(usage, "", Text(prose + "\n"), *shown))
