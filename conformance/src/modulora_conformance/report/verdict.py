"""Sums up a run: a few words for a badge, a sentence, a state for each level, and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from rich.filesize import decimal

from modulora_conformance.results import Kind, Measurement, Outcome, Run

State = Literal["certified", "passed", "failing", "incomplete"]

WORST_FIRST: tuple[Kind, ...] = ("failed", "blocked", "xfailed", "passed", "skipped")

SIZE, ERROR = "bits per weight", "error of gaussian weights"
"""The measurements of L1 that tables show."""

MERGES = "test_a_snapped_weight_keeps_its_grid"
"""The check that a quantizer skips if it has no grid to merge an adapter into."""

PARTS, RECORDED = "test_a_sliced_weight_is_its_part", "test_a_product_can_be_recorded_in_a_graph"
"""The checks of L8 that a quantizer skips if it refuses all cuts, or if no graph records it."""


class Verdict(NamedTuple):
    """A state, and a few words for a badge."""

    state: State
    words: str


def verdict(run: Run) -> Verdict:
    """Certified, failing, or the levels that passed without a gap from L0 on."""
    without = " without hardware" if run.untested else ""
    if run.certified:
        counted = f", {branches(run)}" if run.branches else ""
        return Verdict("certified", f"certified{without} {run.suite}{counted}")
    if run.count("failed") or run.count("blocked"):
        return Verdict("failing", "failing")
    partial = {level for levels in run.partial.values() for level in levels}
    if passed := levels_passed(run.checks, partial):
        return Verdict("passed", f"{passed} passed{without if _reaches_devices(passed) else ''}")
    return Verdict("incomplete", "not certified")


def branches(run: Run) -> str:
    """``"213 checks, 100 % of 148 branches"``."""
    counted = f", {run.branches.words}" if run.branches is not None else ""
    return f"{_checks(run.count('passed'))}{counted}"


def worst(checks: Iterable[Outcome]) -> Kind:
    """The worst outcome; ``"skipped"`` if no check ran."""
    kinds = {check.outcome for check in checks}
    return next((kind for kind in WORST_FIRST if kind in kinds), "skipped")


def levels_passed(checks: Iterable[Outcome], partial: Collection[str] = ()) -> str:
    """``"L0-L3"``: the levels from L0 on whose checks all ran and passed; or empty.

    Args:
        partial: levels that did not run in full.
    """
    checks, passed = list(checks), list[str]()
    for level in (f"L{n}" for n in range(10)):
        found = worst(check for check in checks if check.level == level)
        if found != "passed" or level in partial:
            break
        passed.append(level)
    return "-".join(dict.fromkeys(passed[:1] + passed[-1:]))


def against(run: Run) -> str:
    """The reasons against a certificate, in one sentence, or that there is none."""
    if run.certified or run.sound:
        passed = (
            f"every check of suite {run.suite} passed, except for missing hardware and what the "
            "quantizer does not offer."
        )
        named = f" Nothing ran on {' or '.join(run.untested)}, which the spec names."
        without, passed = (" without hardware", passed + named) if run.untested else ("", passed)
        passed = f"{branches(run)}: {passed}"
        if run.certified:
            return f"Certified{without}: {passed}"
        return f"Passed{without}: {passed} A certificate needs a run with --certified."
    words: dict[Kind, str] = {
        "failed": "failed",
        "blocked": "blocked",
        "xfailed": "failed as expected",
    }
    reasons = [f"{_checks(run.count(k))} {word}" for k, word in words.items() if run.count(k)]
    skips = [c.reason for c in run.checks if c.outcome == "skipped" and c.uncertified]
    if skips:
        reasons.append(
            f"{_checks(len(skips))} skipped for another reason than missing hardware ({skips[0]})"
        )
    passed = "Passed, not certified" if run.checks and not reasons else "Not certified"
    if run.branches is not None and run.branches.missing:
        reasons.append(f"no check ran {len(run.branches.missing)} branches of the plugin")
    if run.branches is not None and run.branches.stale:
        reasons.append(f"{len(run.branches.stale)} entries of not_covered explain nothing")
    if not run.complete:
        reasons.append("this run left out some checks, or configurations that the spec promises")
    return f"{passed}: {'; '.join(reasons) or 'nothing was checked'}."


def _checks(number: int) -> str:
    return f"{number} check{'s' * (number != 1)}"


def repeat(run: Run) -> str:
    """The command that repeats the run with the same draws."""
    seed = f"--seed {run.seed}" if run.seed else ""
    return " ".join(filter(None, ("modulora conformance", run.quantizer, run.only, seed)))


class Row(NamedTuple):
    """A row of the table of configurations; empty where nothing was measured."""

    configuration: str
    size: str
    promise: str
    error: str
    merges: str
    """Whether an adapter can be merged into such weights."""
    serves: str
    """What processes of a server share of a weight, and whether CUDA graphs record products."""
    levels: str
    outcomes: Counter[str]


def rows(run: Run) -> list[Row]:
    """One row for each configuration. Rounding in another order does not change the text."""
    found = []
    for name in run.configurations:
        checks = [check for check in run.checks if check.configuration == name]
        measured = {m.name: m for check in checks for m in check.measurements}
        size, error = measured.get(SIZE), measured.get(ERROR)
        found.append(
            Row(
                name,
                f"{size.value:.4g}" if size else "",
                f"{size.limit:.4g}" if size else "",
                f"{error.value:.2g}" if error else "",
                _merges(checks),
                _serves(checks),
                _levels_text(levels_passed(checks, run.partial.get(name, ())), run.untested),
                Counter(check.outcome for check in checks),
            )
        )
    return found


def _merges(checks: Iterable[Outcome]) -> str:
    found = {check.outcome for check in checks if check.check == MERGES}
    return "yes" if found == {"passed"} else "no" if found == {"skipped"} else "-"


def _serves(checks: Iterable[Outcome]) -> str:
    found = [check for check in checks if check.level == "L8"]
    if worst(found) != "passed":
        return "no" if found else "-"
    passed = {(check.check, check.case) for check in found if check.outcome == "passed"}
    words = [name for i, name in enumerate(("rows", "columns")) if (PARTS, str(i)) in passed]
    return ", ".join([*(words or ["whole"]), *(["graphs"] if (RECORDED, "") in passed else [])])


def _reaches_devices(passed: str) -> bool:
    """Whether levels from L0 on contain L7, which runs on each device."""
    return passed.endswith(("L7", "L8", "L9"))


def _levels_text(passed: str, untested: tuple[str, ...]) -> str:
    found = passed.replace("-", "–") or "none"
    without = untested and _reaches_devices(passed)
    return f"{found} without {', '.join(untested)}" if without else found


def share_text(share: float) -> str:
    """A share of a limit: ``"0%"``, ``"12%"``, ``"7.1 ×"`` above it, ``"not finite"``."""
    if not math.isfinite(share):
        return "not finite"
    if share > 1.005:
        return f"{share:.3g}\u00a0×"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def measured_text(found: Measurement) -> str:
    """A measurement beside its limit: ``"product: 1.2e-07, at most 2e-06"``."""
    value, limit = (_quantity(number, found.unit) for number in (found.value, found.limit))
    if found.limit == math.inf:
        return f"{found.name}: {value}"
    return f"{found.name}: {value}, at most {limit}"


def _quantity(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "not finite"
    if unit == "bytes":
        return decimal(round(value))
    if unit == "seconds":
        return duration(value)
    return f"{value:.4g}" if unit == "relative" else f"{value:.4g} {unit}"


def duration(seconds: float) -> str:
    """Seconds in a suitable unit: ``"12 ms"``."""
    units = ((1, "s"), (1e3, "ms"), (1e6, "µs"))
    factor, unit = next((u for u in units if seconds * u[0] >= 1), (1e9, "ns"))
    return f"{seconds * factor:.3g} {unit}"
