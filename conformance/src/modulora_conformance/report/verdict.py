"""What a run amounts to: a word for a badge, a sentence for what stands against a certificate, a state for each level."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from modulora_conformance.report.reading import Check, Run
from modulora_conformance.results import Kind

State = Literal["certified", "passed", "failing", "incomplete"]

_WORST_FIRST: tuple[Kind, ...] = ("failed", "blocked", "xfailed", "passed", "skipped")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A state, and the few words that a badge has room for."""

    state: State
    words: str


def verdict(run: Run) -> Verdict:
    """Certified, the levels that passed without a gap from L0 on, or failing."""
    if run.certified:
        return Verdict("certified", f"certified {run.suite}")
    if run.count("failed") or run.count("blocked"):
        return Verdict("failing", "failing")
    passed = levels_passed(run.checks)
    return (
        Verdict("passed", f"{passed} passed") if passed else Verdict("incomplete", "not certified")
    )


def level_state(checks: Iterable[Check]) -> Kind:
    """How checks of a level went: by the worst outcome; skipped where none ran."""
    kinds = {check.outcome for check in checks}
    return next((kind for kind in _WORST_FIRST if kind in kinds), "skipped")


def levels_passed(checks: Iterable[Check]) -> str:
    """``"L0-L3"``: the levels from L0 on of which all that ran passed, up to the first of which that isn't so. Empty for none."""
    levels: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        levels[check.level].append(check)
    passed = list(
        takewhile(
            lambda level: level in levels and level_state(levels[level]) == "passed",
            (f"L{n}" for n in range(10)),
        )
    )
    return "-".join(dict.fromkeys(passed[:1] + passed[-1:]))


def against(run: Run) -> str:
    """What stands against a certificate, in one sentence, or that nothing does."""
    if run.certified or run.sound:
        word, end = (
            ("Certified", "")
            if run.certified
            else ("Passed", " A certificate takes a run with --certified.")
        )
        return (
            f"{word}: every check of suite {run.suite} passed, but for hardware that isn't here and what the quantizer doesn't "
            f"offer.{end}"
        )
    reasons = (
        []
        if run.complete
        else [
            "the run didn't cover every level and every configuration that the spec makes promises for"
        ]
    )
    reasons += [
        _counted(kind, run.count(kind))
        for kind in ("failed", "blocked", "xfailed")
        if run.count(kind)
    ]
    skips = Counter(
        check.reason for check in run.checks if check.outcome == "skipped" and check.uncertified
    )
    if skips:
        first = next(iter(skips))
        reasons.append(
            f"{_checks(skips.total())} skipped for another reason than missing hardware ({first})"
        )
    return f"Not certified: {'; '.join(reasons) or 'nothing was checked'}."


def _counted(kind: Kind, number: int) -> str:
    words = {
        "failed": "failed",
        "blocked": "held back after that",
        "xfailed": "failed as expected",
    }
    return f"{_checks(number)} {words[kind]}"


def _checks(number: int) -> str:
    return f"{number} check" if number == 1 else f"{number} checks"


def repeat(run: Run) -> str:
    """The command that repeats the run with the same draws."""
    return f"modulora conformance {run.quantizer}" + (f" --seed {run.seed}" if run.seed else "")
