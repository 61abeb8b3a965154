"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_BY_LETTERS = {unit.lower(): size for unit, size in _UNITS.items()}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Read a size: ``"24GiB"``, ``"1.5 GB"``, ``"4096"`` (bytes). GB is 1000³ and GiB is 1024³.

    Raises:
        ValueError: it isn't a size.
    """
    match = _SIZE.fullmatch(text)
    unit = _BY_LETTERS.get(match[2].lower() or "b") if match else None
    if match is None or unit is None:
        raise ValueError(f"expected a size such as 24GiB, 800MB or 4096 (bytes), got {text!r}")
    return int(float(match[1]) * unit)


def format_size(nbytes: float) -> str:
    """Write a size with three or four digits in binary units: ``"1.25 GiB"``, ``"512 B"``."""
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if abs(nbytes) >= 1024**power:
            value = nbytes / 1024**power
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{nbytes:.0f} B"
