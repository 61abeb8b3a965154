"""Reports of a run, each made from the JSON of :meth:`modulora_conformance.results.Result.to_json` alone.

``python -m modulora_conformance.report FILE.json DIR`` makes them again from a saved one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modulora_conformance.report.reading import read

__all__ = ["table_text", "write_report"]


def table_text(result: Mapping[str, Any], width: int = 100, *, color: bool = False) -> str:
    """The table for a terminal of ``width`` columns, in colors if it has some.

    Raises:
        DataError: ``result`` isn't the JSON of a run.
    """
    from modulora_conformance.report.table import table

    return table(read(result), width, color=color)


def write_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write NAME.json, NAME.html (one self-contained page), NAME.svg (a badge) and NAME.md (a support table) to ``folder``.

    Raises:
        DataError: ``result`` isn't the JSON of a run.
    """
    from modulora_conformance.report.badge import badge
    from modulora_conformance.report.html import page
    from modulora_conformance.report.markdown import support_table

    run = read(result)
    files = {
        "json": json.dumps(_finite(result), indent=1, allow_nan=False) + "\n",
        "html": page(run),
        "svg": badge(run),
        "md": support_table([run]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in files.items():
        (folder / f"{run.quantizer}.{suffix}").write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON doesn't have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
