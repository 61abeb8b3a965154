"""The JSON of a run, validated: what every report is made from. A saved one may come from anybody."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from modulora_conformance.results import Kind, stands_against
from modulora_core.errors import DataError

LEVEL_PATTERN = r"^L[0-9]$"


def _number(value: object) -> object:
    """JSON has no NaN and no infinities: a measurement that is one is stored as null, and is over any limit."""
    return math.inf if value is None or value != value else value


Number = Annotated[float, BeforeValidator(_number)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class Measured(_Value):
    """A number and its limit: :class:`modulora_conformance.measurements.Measurement`."""

    name: str
    value: Number
    limit: Number
    unit: str

    @property
    def share(self) -> float:
        """The value as a share of its limit; 0 where both are 0."""
        if self.value == 0 or not math.isfinite(self.value):
            return self.value
        return self.value / self.limit if self.limit > 0 else math.inf


class Check(_Value):
    """One run of one check: :class:`modulora_conformance.results.Outcome`."""

    level: str = Field(pattern=LEVEL_PATTERN)
    check: str
    case: str
    configuration: str
    outcome: Kind
    reason: str
    seconds: float
    measurements: tuple[Measured, ...] = ()

    @property
    def sentence(self) -> str:
        """The check's name as the sentence that it is."""
        return self.check.removeprefix("test_").replace("_", " ")

    @property
    def uncertified(self) -> bool:
        """Whether a certified run may not have it."""
        return stands_against(self.outcome, self.reason)

    @property
    def errors(self) -> tuple[Measured, ...]:
        """What was measured against a tolerance."""
        return tuple(m for m in self.measurements if m.unit == "relative")


class About(_Value):
    """What a level is about, in the kit's words."""

    title: str = ""
    text: str = ""


class Timing(_Value):
    """One row of the speed against dense (:mod:`modulora_conformance.speed`). Seconds are medians.

    Attributes:
        bytes: what the dense way reads, for a bandwidth; 0 where that says nothing.
        noise: how many times its best the worse of the two medians is: about 1 on a machine that does nothing else.
    """

    name: str
    seconds: float = Field(gt=0)
    dense_seconds: float = Field(gt=0)
    bytes: int = 0
    noise: float = 1.0

    @property
    def speed(self) -> float:
        """How many times as fast as dense."""
        return self.dense_seconds / self.seconds


class Speed(_Value):
    """The timings of one configuration, for a weight of ``shape`` on ``threads`` threads."""

    shape: tuple[int, int]
    threads: int
    timings: tuple[Timing, ...]


class Run(_Value):
    """All that a run found of one quantizer: :meth:`modulora_conformance.results.Result.to_json`."""

    # it names files
    quantizer: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")
    suite: str
    protocol: int
    distribution: str
    version: str
    certified: bool
    complete: bool
    levels: Mapping[Annotated[str, Field(pattern=LEVEL_PATTERN)], Mapping[Kind, int]]
    configurations: tuple[str, ...]
    checks: tuple[Check, ...]
    seconds: float
    seed: str
    environment: Mapping[str, Any]
    about: Mapping[str, About] = {}
    meanings: Mapping[str, str] = {}
    speed: Mapping[str, Speed] = {}

    @model_validator(mode="after")
    def _names_known_configurations(self) -> Run:
        unknown = {check.configuration for check in self.checks} - set(self.configurations)
        if unknown:
            raise ValueError(f"checks of configurations that aren't listed: {sorted(unknown)}")
        return self

    @property
    def sound(self) -> bool:
        """Whether nothing stands against a certificate but that none was asked for."""
        return (
            self.complete
            and bool(self.checks)
            and not any(check.uncertified for check in self.checks)
        )

    def of(self, level: str) -> Iterator[Check]:
        """The checks of a level, in order."""
        return (check for check in self.checks if check.level == level)

    def count(self, kind: Kind) -> int:
        """How many checks had this outcome."""
        return sum(counts.get(kind, 0) for counts in self.levels.values())

    def title(self, level: str) -> str:
        """What a level is about, in a word or two."""
        return self.about[level].title if level in self.about else ""

    def measured(
        self, unit: str, configuration: str | None = None
    ) -> Iterator[tuple[Check, Measured]]:
        """Every measurement in a unit, with its check."""
        for check in self.checks:
            if configuration in (None, check.configuration):
                yield from ((check, found) for found in check.measurements if found.unit == unit)


def read(result: Mapping[str, Any]) -> Run:
    """Validate the JSON of a run.

    Raises:
        DataError: it isn't one; says the first field that is wrong.
    """
    try:
        return Run.model_validate(result)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"result of a conformance run: expected the JSON that `modulora conformance NAME --report DIR` writes, got {where or 'it'}: "
            f"{first['msg']}; run the kit again"
        ) from None


def read_file(path: Path) -> Run:
    """The same from a file.

    Raises:
        DataError: the file can't be read, or isn't the JSON of a run; names it.
    """
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{path}: {error}") from None
