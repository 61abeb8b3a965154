"""Turn reStructuredText roles in docstrings into Markdown, as a griffe extension of mkdocs.yml."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?([\w.]+)`")
_BLOCK_FOLLOWS = re.compile(r"(\s?)::$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once the whole package is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for obj in _objects(pkg):
            if obj.docstring is not None:
                obj.docstring.value = _as_markdown(obj.docstring.value, obj)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if isinstance(member, griffe.Object):  # an alias belongs to another module
            yield from _objects(member)


def _as_markdown(text: str, obj: griffe.Object) -> str:
    """Make a role a link, and ``::`` before an indented block a colon, or nothing."""

    def link(match: re.Match[str]) -> str:
        shown = match[0].split("`")[1]
        shown = shown.rpartition(".")[2] if shown.startswith("~") else shown
        return f'<autoref identifier="{_path(match[1], obj)}" optional>`{shown}`</autoref>'

    return _BLOCK_FOLLOWS.sub(lambda match: "" if match[1] else ":", _ROLE.sub(link, text))


def _path(name: str, obj: griffe.Object) -> str:
    """The full path of a name in a docstring."""
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name
