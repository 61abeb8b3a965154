"""A badge for a README: a flat SVG, made here, so that no service is asked whenever somebody reads the page."""

from __future__ import annotations

from html import escape

from modulora_conformance.report.reading import Run
from modulora_conformance.report.verdict import State, verdict

LABEL = "modulora conformance"

COLORS: dict[State, str] = {
    "certified": "#2a7d2e",
    "passed": "#1f6feb",
    "failing": "#c0362c",
    "incomplete": "#6a6f76",
}
"""White text has a contrast of 4.5 and more on each (WCAG 2, AA)."""

_WIDTHS = {3.1: "ijl.,:'|", 4.4: "frt-() ", 10.5: "mwMW"}
"""Of letters of Verdana at 11 px, in px; of the others about 7."""


def badge(run: Run) -> str:
    """The SVG text. The width of words is an estimate, to which ``textLength`` then fits the browser's font."""
    result = verdict(run)
    left, right = _width(LABEL), _width(result.words)
    total = left + right + 20 + 20
    label, words = escape(LABEL), escape(result.words)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="20" role="img" aria-label="{label}: {words}">
<title>{label}: {words} ({escape(run.quantizer)})</title>
<clipPath id="r"><rect width="{total}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{left + 20}" height="20" fill="#444a50"/>\
<rect x="{left + 20}" width="{right + 20}" height="20" fill="{COLORS[result.state]}"/></g>
<g fill="#fff" font-family="Verdana,DejaVu Sans,Geneva,sans-serif" font-size="11">
<text x="10" y="14" textLength="{left}">{label}</text>
<text x="{left + 30}" y="14" textLength="{right}">{words}</text>
</g>
</svg>
"""


def _width(text: str) -> int:
    """About as wide as Verdana at 11 px."""
    return round(
        sum(next((width for width, letters in _WIDTHS.items() if c in letters), 7.0) for c in text)
    )
