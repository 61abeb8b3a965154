"""Put each command's help on the page of the command line. mkdocs.yml names this file as a hook."""

from __future__ import annotations

import inspect
import re
from typing import Any

PAGE = "reference/command-line.md"
PLACE = re.compile(r"<!-- docs/command_line\.py .*-->")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with one section for each command. mkdocs calls this for every page."""
    if page.file.src_uri != PAGE:
        return markdown
    from modulora_core.cli.app import COMMANDS

    return PLACE.sub(lambda _: "\n\n".join(map(section, COMMANDS)), markdown)


def section(name: str) -> str:
    """The help of one command: its docstring, and a table of its arguments and options."""
    from modulora_core.cli.app import load_command

    command = load_command(name)
    text = inspect.getdoc(command.callback) or ""
    text = re.sub(r"Examples:\n((?:  .*\n?)+)", r"```text\n\1\n```", text)
    text = re.sub(r"^ +modulora", "modulora", text, flags=re.MULTILINE)
    rows = [row(each) for each in command.params if each.name not in ("json", "debug")]
    return "\n".join(
        [f"### {name}", "", text, "", "| option | meaning | default |", "|-|-|-|", *rows]
    )


def row(parameter: Any) -> str:
    """One argument or option."""
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    words = f"{names} {parameter.metavar or ''}".rstrip()
    if parameter.param_type_name == "argument":
        words = parameter.metavar
    shown = parameter.show_default  # a text, or whether to show the default
    default = shown if isinstance(shown, str) else parameter.default if shown else ""
    cells = [
        f"`{words}`",
        (parameter.help or "").replace("|", "&#124;"),
        "" if default is None or default is False or default == [] else str(default),
    ]
    return f"| {' | '.join(cells)} |"
