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
    from modulora_core.cli.app import command_names

    return PLACE.sub(lambda _: "\n\n".join(map(section, command_names())), markdown)


def section(name: str) -> str:
    """The help of one command: its docstring, and a block to unfold with its options."""
    from modulora_core.cli.app import load_command

    command = load_command(name)
    text = inspect.getdoc(command.callback) or ""
    text = re.sub(r"Examples:\n((?:  .*\n?)+)", r"```text\n\1\n```", text)
    text = re.sub(r"^ +(?=MODULORA_|modulora)", "", text, flags=re.MULTILINE)
    items = [item(each) for each in command.params if each.name not in ("json", "debug")]
    title = f'??? note "Options of {name}"'
    return "\n".join([f"### {name}", "", text, "", title, "", *items])


def item(parameter: Any) -> str:
    """One argument or option, as an item of Markdown's list."""
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    words = f"{names} {parameter.metavar or ''}".rstrip()
    if parameter.param_type_name == "argument":
        words = parameter.metavar
    shown = parameter.show_default  # a text, or whether to show the default
    default = shown if isinstance(shown, str) else parameter.default if shown else ""
    said = "" if default in (None, "", False, []) else f" Default: {default}."
    return f"    * `{words}`: {parameter.help or ''}{said}"
