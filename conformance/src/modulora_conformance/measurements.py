"""What a check measures, beside its limit: for the failure's message and for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number and its limit.

    Attributes:
        name: what was measured; unit: ``"relative"``, ``"bytes"``, ``"bits"`` or ``"seconds"``.
        value: the worst over the check's examples; limit: what it must not exceed.
    """

    name: str
    value: float
    limit: float
    unit: str

    @property
    def share(self) -> float:
        """The value as a share of its limit."""
        if self.limit == 0:
            return 0.0 if self.value == 0 else math.inf
        return self.value / self.limit

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "limit": self.limit, "unit": self.unit}


class Measurements:
    """Those of one run of a check: the worst of each name is kept."""

    def __init__(self) -> None:
        self.worst: dict[str, Measurement] = {}

    def at_most(
        self, name: str, value: float, limit: float, *, unit: str = "relative", case: object = ""
    ) -> None:
        """Keep a measurement, and fail where it exceeds its limit.

        Raises:
            AssertionError: the value is above the limit, or NaN; says the case.
        """
        found = Measurement(name, value, limit, unit)
        before = self.worst.get(name)
        if before is None or not found.share <= before.share:
            self.worst[name] = found
        where = f" ({case})" if case != "" else ""
        assert value <= limit, (
            f"{name}{where}: expected at most {limit:.4g}, got {value:.4g} ({unit})"
        )
