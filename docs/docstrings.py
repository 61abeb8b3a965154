"""For the reference page: what docstrings have of reStructuredText, as Markdown. mkdocs.yml names it as griffe's extension."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?([\w.]+)`")
_BLOCK_FOLLOWS = re.compile(r"(\s?)::$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package, when all of it is known."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for obj in _objects(pkg):
            if obj.docstring is not None:
                obj.docstring.value = _as_markdown(obj.docstring.value, obj)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if isinstance(member, griffe.Object):  # an alias is somebody else's
            yield from _objects(member)


def _as_markdown(text: str, obj: griffe.Object) -> str:
    """Roles as code that links to what the page has of it; ``::`` before an indented block as a colon, or as nothing."""

    def link(match: re.Match[str]) -> str:
        shown = match[0].split("`")[1]
        shown = shown.rpartition(".")[2] if shown.startswith("~") else shown
        return f'<autoref identifier="{_path(match[1], obj)}" optional>`{shown}`</autoref>'

    return _BLOCK_FOLLOWS.sub(lambda match: "" if match[1] else ":", _ROLE.sub(link, text))


def _path(name: str, obj: griffe.Object) -> str:
    """The full name of what a docstring calls ``name``."""
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name
