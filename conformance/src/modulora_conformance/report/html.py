"""Renders a run as one self-contained HTML page, and as a badge.

The words come from plugins, and from files that anybody may send. The template escapes them, and
its Content-Security-Policy lets a browser load nothing. torch depends on Jinja, so it is installed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from modulora_conformance.report import verdict as summary
from modulora_conformance.report.verdict import State, verdict, worst
from modulora_conformance.results import Measurement, Outcome, Run

_FOLDER = Path(__file__).parent

_CODE = re.compile(r"``?([^`]+)``?")

SIGNS = {"passed": "✓", "failed": "✕", "blocked": "⊘", "skipped": "–", "xfailed": "≈"}
"""Each stands beside its word, for readers who see no colors."""

COLORS: dict[State, str] = {
    "certified": "#2a7d2e",
    "passed": "#1f6feb",
    "failing": "#c0362c",
    "incomplete": "#6a6f76",
}
"""White text has a contrast of at least 4.5 on each (WCAG 2, AA)."""

LABEL = "modulora conformance"

NOISY = 2.0
"""The page warns if a median of the speed is more than this many times its best."""


def page(run: Run) -> str:
    """The text of the page."""
    levels = {level: _groups(run, level) for level in run.levels}
    noises = [timing["noise"] for speed in run.speed.values() for timing in speed["timings"]]
    return _template().render(
        run=run,
        verdict=verdict(run),
        levels=levels,
        failures=run.failures,
        errors=_worst(run, "relative", lambda check, _: f"{check.level} {check.sentence}"),
        memory=_worst(run, "bytes", lambda _, found: found.name),
        noise=max(noises, default=0.0) > NOISY,
        environment=list(_flat(run.environment)),
        signs=SIGNS,
        words={"xfailed": "expected failure"},
        summary=summary,
        worst=worst,
        count=lambda checks: Counter(check.outcome for check in checks),
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    return environment.get_template("page.html.jinja")


def _prose(docstring: str) -> Markup:
    """A docstring, escaped, with code between backticks."""
    pieces = _CODE.split(docstring)  # every other piece was between backticks
    formats = (Markup("{}"), Markup("<code>{}</code>"))
    return Markup("").join(formats[i % 2].format(piece) for i, piece in enumerate(pieces))


def _groups(run: Run, level: str) -> dict[str, list[Outcome]]:
    """The outcomes of each check of a level."""
    groups: dict[str, list[Outcome]] = {}
    for check in run.of(level):
        groups.setdefault(check.check, []).append(check)
    return groups


def _worst(
    run: Run, unit: str, label: Callable[[Outcome, Measurement], str]
) -> dict[str, dict[str, Measurement]]:
    """The worst measurement in a unit by label and configuration."""
    rows: dict[str, dict[str, Measurement]] = {}
    for check in run.checks:
        for found in check.measurements:
            if found.unit == unit:
                cells = rows.setdefault(label(check, found), {})
                before = cells.get(check.configuration)
                if before is None or found.share > before.share:
                    cells[check.configuration] = found
    return rows


def _flat(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of the environment, packages included."""
    for name, value in environment.items():
        if isinstance(value, Mapping):
            yield from _flat({key: item or "not installed" for key, item in value.items()})
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(map(str, value)) or "none"
        else:
            yield name, str(value)


def badge(run: Run) -> str:
    """A flat SVG. ``textLength`` fits the browser's font to the estimated width of the words."""
    found = verdict(run)
    left, right = (round(6.6 * len(text)) for text in (LABEL, found.words))
    total, words = left + right + 40, escape(found.words)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="20"
role="img" aria-label="{LABEL}: {words}">
<title>{LABEL}: {words} ({escape(run.quantizer)})</title>
<clipPath id="r"><rect width="{total}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{left + 20}" height="20" fill="#444a50"/>
<rect x="{left + 20}" width="{right + 20}" height="20" fill="{COLORS[found.state]}"/></g>
<g fill="#fff" font-family="Verdana,DejaVu Sans,Geneva,sans-serif" font-size="11">
<text x="10" y="14" textLength="{left}">{LABEL}</text>
<text x="{left + 30}" y="14" textLength="{right}">{words}</text>
</g>
</svg>
"""
