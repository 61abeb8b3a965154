"""What the kit says of its levels and checks in its docstrings, for reports."""

from __future__ import annotations

import inspect
import re
import sys

from modulora_conformance.checks import Level, checks_of, guard

_PREFIX = re.compile(r"^L\d[:,]\s*")
"""How the docstrings of the levels' modules begin."""


def about(cls: type) -> dict[str, dict[str, str]]:
    """The title of each level in ``cls``, and what its module says of it."""
    levels: dict[str, type[Level]] = {}
    for _, _, level in checks_of(cls):
        levels.setdefault(level.level, level)  # one that adds to a level comes after it
    return {
        name: {
            "title": level.title,
            "text": _text(inspect.getdoc(sys.modules[level.__module__]), level.title),
        }
        for name, level in sorted(levels.items())
    }


def meanings(cls: type) -> dict[str, str]:
    """What it means where a check of ``cls`` fails, by its name."""
    checks = {name: check for name, check, _ in checks_of(cls)} | {
        "test_no_check_is_overridden_or_deleted": guard
    }
    return {name: " ".join((inspect.getdoc(check) or "").split()) for name, check in checks.items()}


def _text(docstring: str | None, title: str) -> str:
    """The docstring without the level's number and title in front, one paragraph a line."""
    text = _PREFIX.sub("", docstring or "")
    text = re.sub(rf"^{re.escape(title)}\s*[:.,]?\s*", "", text)
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    text = "\n".join(paragraph for paragraph in paragraphs if paragraph)
    return text[:1].upper() + text[1:]
