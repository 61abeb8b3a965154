"""Numbers as people read them."""

from __future__ import annotations

import math

from modulora_conformance.report.reading import Measured

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB")


def share_text(share: float) -> str:
    """A share of a tolerance: ``"exact"``, ``"12%"``, ``"7.1 ×"`` beyond it, ``"not finite"``."""
    if share == 0:
        return "exact"
    if not math.isfinite(share):
        return "not finite"
    if share > 1.005:
        return f"{share:.3g}\u00a0×"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def quantity(value: float, unit: str) -> str:
    """A value with its unit; a relative one has none."""
    if not math.isfinite(value):
        return "not finite"
    if unit == "bytes":
        return size(value)
    if unit == "seconds":
        return duration(value)
    number = f"{value:.4g}"
    return number if unit == "relative" else f"{number} {unit}"


def measured_text(found: Measured) -> str:
    """A measurement beside its limit: ``"product: 1.2e-07, at most 2e-06"``."""
    return f"{found.name}: {quantity(found.value, found.unit)}, at most {quantity(found.limit, found.unit)}"


def size(nbytes: float) -> str:
    """Bytes in binary units: ``"1.50 MiB"``."""
    power = 0
    while abs(nbytes) >= 1024 and power < len(_BYTE_UNITS) - 1:
        nbytes /= 1024
        power += 1
    return f"{nbytes:.0f} B" if power == 0 else f"{nbytes:.3g} {_BYTE_UNITS[power]}"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: ``"12 ms"``."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
