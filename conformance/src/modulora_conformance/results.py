"""Holds what a run found, and reads and writes it as JSON. Every report is made from it.

A saved file may come from anybody, so it is validated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    computed_field,
)

from modulora_conformance.checks import in_words
from modulora_core.errors import DataError
from modulora_core.models.json_files import read_json

Kind = Literal["passed", "failed", "skipped", "blocked", "xfailed"]
"""``blocked``: a check that this one needs failed. ``xfailed``: it failed, as a subclass
expected."""

KINDS: tuple[Kind, ...] = ("passed", "failed", "skipped", "blocked", "xfailed")

HARDWARE, NOT_OFFERED = "missing hardware: ", "not offered: "
NOT_INSTALLED = "not installed: "
"""A certified run allows skips whose reasons begin so: hardware is missing, the spec offers none,
or another program isn't installed."""

PACKING = "packing one large weight, "
"""The measurement of so many seconds, which reports count apart from the checks' own."""

GOLDEN = "_golden_vectors"
"""The end of the names of checks that run only with golden vectors."""


def _number(value: object) -> object:
    """JSON has no NaN and no infinity: null is infinite, and above any limit."""
    return math.inf if value is None or value != value else value


Number = Annotated[float, BeforeValidator(_number)]
LevelName = Annotated[str, Field(pattern=r"^L[0-9]$")]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class Measurement(_Value):
    """A number and its limit."""

    name: str
    value: Number
    limit: Number
    unit: str
    """``"relative"``, ``"bytes"``, ``"bits"`` or ``"seconds"``."""

    @property
    def share(self) -> float:
        """The value divided by its limit; 0 if both are 0."""
        if self.value == 0 or not math.isfinite(self.value):
            return self.value
        return self.value / self.limit if self.limit > 0 else math.inf


class Measurements:
    """Collects the measurements of one check. It keeps the worst for each name."""

    def __init__(self) -> None:
        self.worst: dict[str, Measurement] = {}
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Let the report say what a check left out."""
        self.notes.append(text)

    def at_most(
        self, name: str, value: float, limit: float, *, unit: str = "relative", case: object = ""
    ) -> None:
        """Record a measurement, and fail if it exceeds its limit.

        Raises:
            AssertionError: the value is above the limit, or NaN; the message names the case.
        """
        __tracebackhide__ = True  # pytest shows the check that called
        found = Measurement(name=name, value=value, limit=limit, unit=unit)
        if name not in self.worst or found.share > self.worst[name].share:
            self.worst[name] = found
        where = f" ({case})" if case != "" else ""
        got = f"{value:.4g}" if math.isfinite(value) else "NaN or Inf"
        assert value <= limit, f"{name}{where}: expected at most {limit:.4g}, got {got} ({unit})"


class Outcome(_Value):
    """One run of one check."""

    level: LevelName
    check: str
    """``test_...``."""
    case: str = ""
    """The check's own parameters."""
    configuration: str
    """The quantizer's options in one line."""
    outcome: Kind
    reason: str = ""
    """Why it was skipped or failed: one line."""
    seconds: float
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    """What it left out."""

    @property
    def sentence(self) -> str:
        """The check's name with spaces."""
        return in_words(self.check)

    @property
    def uncertified(self) -> bool:
        """Whether a certified run excludes this outcome."""
        if self.outcome == "skipped":
            return not self.reason.startswith((HARDWARE, NOT_OFFERED, NOT_INSTALLED))
        return self.outcome != "passed"


class Branch(_Value):
    """A branch of the plugin's source that no check ran."""

    name: str
    """Its module, function and source: it survives edits elsewhere."""
    file: str
    line: int
    source: str
    reason: str = ""
    """The author's, from the plugin's pyproject.toml."""


class Branches(_Value):
    """The branches of the functions that the quantizer reaches, in its package and its bases'."""

    total: int
    missing: tuple[Branch, ...] = ()
    """No check ran them, and nothing explains them."""
    explained: tuple[Branch, ...] = ()
    stale: tuple[str, ...] = ()
    """Explanations of a branch that ran, or that the source no longer has."""
    notes: tuple[str, ...] = ()
    """Errors of the tours that show compiled code in the interpreter."""

    @property
    def complete(self) -> bool:
        return not self.missing and not self.stale

    @property
    def words(self) -> str:
        """``"100 % of 148 branches, 3 explained"``."""
        counted = self.total - len(self.explained)
        share = 100 if counted == 0 else int(100 * (counted - len(self.missing)) / counted)
        others = f", {len(self.explained)} explained" if self.explained else ""
        return f"{share} % of {counted} branches{others}"


class Run(_Value):
    """Everything that a run found for one quantizer."""

    quantizer: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")
    """It names files."""
    suite: str
    protocol: int
    distribution: str
    version: str
    devices: tuple[str, ...] = ("cpu",)
    """The types of devices that the spec names."""
    certified: bool
    """Whether ``--certified`` was given, and the run is sound."""
    complete: bool
    """Whether every check ran for every configuration that the spec makes promises for, and no case
    of one was deselected."""
    partial: Mapping[str, tuple[LevelName, ...]] = {}
    """By configuration, the levels of which a check or a case did not run."""
    checks: tuple[Outcome, ...]
    branches: Branches | None = None
    """None if they were not counted."""
    seed: str
    only: str = ""
    """The options of ``modulora conformance`` that chose checks or a configuration."""
    environment: Mapping[str, Any]
    about: Mapping[str, Mapping[str, str]] = {}
    meanings: Mapping[str, str] = {}
    speed: Mapping[str, Mapping[str, Any]] = {}
    """By configuration, from :func:`modulora_conformance.bench.quantizer_bench.measure_speed`."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def levels(self) -> dict[str, dict[str, int]]:
        """How many checks of each level had each outcome."""
        counts: dict[str, dict[str, int]] = {}
        for level in sorted({check.level for check in self.checks}):
            found = Counter(check.outcome for check in self.of(level))
            counts[level] = {kind: found[kind] for kind in KINDS}
        return counts

    @computed_field  # type: ignore[prop-decorator]
    @property
    def failures(self) -> tuple[Outcome, ...]:
        return tuple(check for check in self.checks if check.outcome == "failed")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def configurations(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(check.configuration for check in self.checks))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        return round(sum(check.seconds for check in self.checks), 2)

    @property
    def untested(self) -> tuple[str, ...]:
        """The devices that the spec names, and that no check of level 7 ran on."""
        ran = {c.check.split("_")[1] for c in self.of("L7") if c.outcome == "passed"} | {"cpu"}
        return tuple(device for device in self.devices if device not in ran)

    @property
    def packing(self) -> dict[str, float]:
        """The seconds that packing one large weight took, by the configuration and the weight."""
        return {
            f"{check.configuration}: {found.name}": found.value
            for check in self.checks
            for found in check.measurements
            if found.name.startswith(PACKING)
        }

    @property
    def sound(self) -> bool:
        """Whether the run would be certified with ``--certified``."""
        passed = bool(self.checks) and not any(c.uncertified for c in self.checks)
        covered = self.branches is None or self.branches.complete
        return self.complete and passed and covered

    def of(self, level: str) -> Iterator[Outcome]:
        """The checks of a level, in order."""
        return (check for check in self.checks if check.level == level)

    def count(self, kind: Kind) -> int:
        """How many checks had this outcome."""
        return sum(check.outcome == kind for check in self.checks)

    def title(self, level: str) -> str:
        """The name of a level."""
        return self.about.get(level, {}).get("title", "")


def read_file(path: Path) -> Run:
    """Read the JSON of a run.

    Raises:
        DataError: the file cannot be read, or holds something else; the message names the field.
    """
    advice = "write it again with `modulora conformance NAME --report DIR`"
    return read_json(path, Run, error=DataError, advice=advice)
