"""What a run found of one quantizer, as a value, and as the JSON that every report is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modulora_conformance import SUITE

Kind = Literal["passed", "failed", "skipped", "blocked", "xfailed"]
"""``blocked``: a check that it needs failed before. ``xfailed``: it failed as a subclass said it would."""

HARDWARE = "missing hardware: "
NOT_OFFERED = "not offered: "
ALLOWED_SKIPS = (HARDWARE, NOT_OFFERED)
"""How the reasons of skips begin that a certified run allows: hardware that isn't here, and what the spec doesn't offer at all."""


GOLDEN = "_golden_vectors"
"""How the names of checks end that are left out where there are no golden vectors."""


def stands_against(kind: Kind, reason: str) -> bool:
    """Whether a certified run may not have such an outcome."""
    if kind == "skipped":
        return not reason.startswith(ALLOWED_SKIPS)
    return kind != "passed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one check.

    Attributes:
        level: ``"L0"`` to ``"L7"``; check: its name, ``test_...``; case: its parameters, if it has some.
        configuration: the quantizer's options in one line.
        reason: why it was skipped or failed: one line.
        measurements: :meth:`modulora_conformance.measurements.Measurement.to_json` of each.
    """

    level: str
    check: str
    case: str
    configuration: str
    kind: Kind
    reason: str
    seconds: float
    measurements: tuple[Mapping[str, Any], ...] = ()

    @property
    def uncertified(self) -> bool:
        """Whether a certified run may not have it."""
        return stands_against(self.kind, self.reason)

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level, "check": self.check, "case": self.case, "configuration": self.configuration,
                "outcome": self.kind, "reason": self.reason, "seconds": round(self.seconds, 4),
                "measurements": [dict(item) for item in self.measurements]}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """All outcomes of one quantizer.

    Attributes:
        quantizer: its name; protocol: the one it was written for; distribution, version: of its package.
        complete: whether every check of every level was asked for, of every configuration that the spec makes promises for.
        environment: versions and machine (:func:`modulora_conformance.environment.environment`); seed: Hypothesis's.
        about: the title and text of each level; meanings: the docstring of each check, by name: for reports.
        asked: whether a certificate was asked for.
        speed: :func:`modulora_conformance.speed.measure_speed` by configuration, where it was measured. Nothing depends on it.
    """

    quantizer: str
    protocol: int
    distribution: str
    version: str
    complete: bool
    outcomes: tuple[Outcome, ...]
    seed: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    speed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: bool = False

    @property
    def certified(self) -> bool:
        """Whether a certificate was asked for, the run was complete, and nothing in it stands against one."""
        sound = bool(self.outcomes) and not any(o.uncertified for o in self.outcomes)
        return self.asked and self.complete and sound

    def to_json(self) -> dict[str, Any]:
        return {
            "quantizer": self.quantizer,
            "suite": SUITE,
            "protocol": self.protocol,
            "distribution": self.distribution,
            "version": self.version,
            "certified": self.certified,
            "complete": self.complete,
            "levels": _levels(self.outcomes),
            "failures": [o.to_json() for o in self.outcomes if o.kind == "failed"],
            "configurations": list(dict.fromkeys(o.configuration for o in self.outcomes)),
            "checks": [o.to_json() for o in self.outcomes],
            "seconds": round(sum(o.seconds for o in self.outcomes), 2),
            "seed": self.seed,
            "environment": dict(self.environment),
            "about": {level: dict(told) for level, told in self.about.items()},
            "meanings": dict(self.meanings),
            "speed": {
                configuration: dict(measured) for configuration, measured in self.speed.items()
            },
        }


def _levels(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.level, Counter())[outcome.kind] += 1
    return {level: {kind: count[kind] for kind in ("passed", "failed", "skipped", "blocked", "xfailed")}
            for level, count in sorted(counts.items())}  # fmt: skip
