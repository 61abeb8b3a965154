"""Put all checks on the page of the conformance kit. mkdocs.yml names this file."""

from __future__ import annotations

from itertools import groupby
from typing import Any

PAGE = "reference/conformance.md"
PLACE = "<!-- docs/checks.py lists the checks here -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with an item for each check. mkdocs calls this for every page."""
    return markdown.replace(PLACE, listed()) if page.file.src_uri == PAGE else markdown


def listed() -> str:
    """The checks as ``modulora conformance --list`` prints them: a block to unfold for each level,
    with an item for each check."""
    from modulora_conformance.checks import explained
    from modulora_conformance.suite import QuantizerConformance

    levels = groupby(explained(QuantizerConformance), lambda check: check.level)
    return "\n".join(line for level, checks in levels for line in block(level, list(checks)))


def block(level: str, checks: list[Any]) -> list[str]:
    """One level as Markdown of pymdownx.details."""
    items = [f"    * `{each.check}`: {each.fault} {each.advice}".rstrip() for each in checks]
    return [f'??? note "{level}: {len(checks)} checks"', "", *items, ""]
