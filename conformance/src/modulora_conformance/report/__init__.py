"""Writes the reports of a run: a page, a badge, a support table, and JSON."""

from __future__ import annotations

from pathlib import Path

from modulora_conformance.results import Run

__all__ = ["write_report"]


def write_report(run: Run, folder: Path) -> None:
    """Write NAME.json, NAME.html (self-contained), NAME.svg (a badge) and NAME.md to ``folder``."""
    from modulora_conformance.report.html import badge, page
    from modulora_conformance.report.support import badge_and_table

    files = {
        "json": run.model_dump_json(indent=1) + "\n",
        "html": page(run),
        "svg": badge(run),
        "md": badge_and_table(run),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in files.items():
        (folder / f"{run.quantizer}.{suffix}").write_text(text, encoding="utf-8")
