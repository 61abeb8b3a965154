"""Put signatures and docstrings on the reference pages. mkdocs.yml names this file as a hook.

In the source, a name of the API is a list item with a link to its file, which reads well in a
clone. The hook replaces the item by mkdocstrings' directive.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

ITEM = re.compile(
    r"^\* \[`([\w.]+)`\]\(\.\./\.\./(?:plugins/\w+/src/)?(modulora_\w+/[\w/.]+\.py)\)"
    r"(.*(?:\n  .+)*)",
    re.M,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with a directive for each item. mkdocs calls this for every page."""
    return ITEM.sub(directive, markdown)


def directive(item: re.Match[str]) -> str:
    """The item's directive, with the members that the item names after a colon."""
    file, text = PurePosixPath(item[2]), item[3]
    name = item[1] if item[1].startswith(file.parts[0]) else f"modulora_core.{item[1]}"
    module, package = (".".join(path.parts) for path in (file.with_suffix(""), file.parent))
    members = re.findall(r"`(\w+)`", text) if text.startswith(":") else []
    options = []
    if name == module:
        options.append("show_root_full_path: true")
    if members or name == package:
        options.append(f"members: {members or 'false'}")
    lines = ["    options:", *(f"      {option}" for option in options)] if options else []
    return "\n".join(["", f"::: {name}", *lines, ""])
