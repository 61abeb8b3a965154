"""Put a table of all checks on the page of the conformance kit. mkdocs.yml names this file."""

from __future__ import annotations

from typing import Any

PAGE = "reference/conformance.md"
PLACE = "<!-- docs/checks.py inserts the table here -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with a row for each check. mkdocs calls this for every page."""
    return markdown.replace(PLACE, table()) if page.file.src_uri == PAGE else markdown


def table() -> str:
    """The checks as ``modulora conformance --list`` prints them, in Markdown."""
    from modulora_conformance.checks import explained
    from modulora_conformance.suite import QuantizerConformance

    rows = [("level", "check", "a failure says", "mend it"), ("-", "-", "-", "-")]
    rows += [
        (check.level, f"`{check.check}`", check.fault, check.advice)
        for check in explained(QuantizerConformance)
    ]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows
    )
