"""The part of the pytest plugin that orders the kit's checks, holds back blocked ones, and keeps the outcomes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from modulora_conformance.checks import Level, checks_of, needed_by
from modulora_conformance.measurements import Measurements
from modulora_conformance.results import GOLDEN, Kind, Outcome, Result

if TYPE_CHECKING:
    from modulora_core.spec import Quantizer

MEASUREMENTS = pytest.StashKey[Measurements]()

BLOCKED = "blocked: "

GUARD = "test_no_check_is_overridden_or_deleted"

_FIXTURES = ("quantizer", "conformance_configuration")
"""Fixtures whose parameters choose the quantizer; those of a check itself are its cases."""


@dataclass
class _Found:
    """What is known of one quantizer so far: the class with the checks, and an instance for each configuration."""

    quantizer: Quantizer
    cls: type
    instances: dict[str, Quantizer] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)


class Recorder:
    """Registered once a run of pytest. Items of other tests pass through untouched."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._failed: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._found: dict[str, _Found] = {}
        self._titles: dict[tuple[str, str], str] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._complete = True

    @property
    def _certifying(self) -> bool:
        return bool(self._config.getoption("--certified"))

    def results(self) -> Iterator[Result]:
        """One for each quantizer that was checked, in the order of their first checks."""
        from modulora_conformance.descriptions import about, meanings
        from modulora_conformance.environment import environment, origin

        for name, found in self._found.items():
            spec = found.quantizer.spec
            complete = self._complete and _is_complete(found)
            seed = str(self._config.getoption("hypothesis_seed", ""))
            yield Result(
                name, spec.protocol, *origin(name), complete, tuple(found.outcomes), seed, environment(),
                about(found.cls), meanings(found.cls), asked=self._certifying,
            )  # fmt: skip

    # -- collection

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        left_out = [item for item in items if _is_check(item) and self._is_left_out(item)]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
        first: dict[object, int] = {}
        for position, item in enumerate(items):
            first.setdefault(getattr(item, "cls", None) if _is_check(item) else item, position)
        order = {cls: _order(cls) for cls in first if isinstance(cls, type)}

        def key(item: pytest.Item) -> tuple[int, int]:
            if not _is_check(item):
                return first[item], 0
            cls = item.cls  # type: ignore[attr-defined]
            return first[cls], order[cls].get(_function(item), 0)

        items.sort(key=key)

    def _is_left_out(self, item: pytest.Item) -> bool:
        level = _level(item)
        if int(level[1:]) > self._config.getoption("--conformance-level"):
            self._complete = False
            return True
        # golden vectors are the plugin author's: without some there is nothing to hold
        return _function(item).endswith(GOLDEN) and golden_of(item) is None

    # -- running

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if not _is_check(item):
            return
        function = getattr(item.cls, _function(item))  # type: ignore[attr-defined]
        needed = needed_by(function, _level(item))
        failed = [name for name in needed if name in self._failed[_key(item)]]
        if failed:
            pytest.skip(f"{BLOCKED}{', '.join(failed)} failed before")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self,
        item: pytest.Item,
        call: pytest.CallInfo[None],
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if _is_check(item) and (report.when == "call" or not report.passed):
            self._record(item, report, None if call.excinfo is None else call.excinfo.value)
        return report

    def _record(
        self, item: pytest.Item, report: pytest.TestReport, error: BaseException | None
    ) -> None:
        kind, reason = _kind(report, error)
        if kind in ("failed", "blocked"):  # what needs a blocked check says nothing new either
            self._failed[_key(item)].add(_function(item))
        quantizer = getattr(item, "funcargs", {}).get("quantizer")
        if quantizer is not None:
            self._titles.setdefault(_key(item), _title(quantizer))
            found = self._found.setdefault(quantizer.spec.name, _Found(quantizer, item.cls))  # type: ignore[attr-defined]
            found.instances.setdefault(self._titles[_key(item)], quantizer)
        elif _key(item) not in self._titles:
            return  # the fixture itself failed, and pytest tells it
        found = self._of(item, quantizer)
        measured = item.stash[MEASUREMENTS].worst.values() if MEASUREMENTS in item.stash else ()
        measurements = tuple(m.to_json() for m in measured)
        for measurement in measurements:
            item.user_properties.append((f"modulora:{measurement['name']}", measurement["value"]))
        found.outcomes.append(Outcome(_level(item), _function(item), _case(item), self._titles[_key(item)], kind, reason,
                                      report.duration, measurements))  # fmt: skip

    def _of(self, item: pytest.Item, quantizer: Any) -> _Found:
        """Where an item's outcome belongs; a blocked one, whose fixtures never ran, follows those of its class."""
        if quantizer is not None:
            self._names[_key(item)] = quantizer.spec.name
            return self._found[quantizer.spec.name]
        return self._found[self._names[_key(item)]]

    # -- the end

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._found:
            return
        results = list(self.results())
        if (
            self._certifying
            and session.exitstatus == pytest.ExitCode.OK
            and not all(r.certified for r in results)
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        folder = self._config.getoption("--conformance-report")
        if folder is not None:
            from modulora_conformance.report import write_report
            from modulora_conformance.speed import measure_speed

            for result in results:
                instances = self._found[result.quantizer].instances
                speed = {
                    title: measured
                    for title, instance in instances.items()
                    if (measured := measure_speed(instance))
                }
                write_report(replace(result, speed=speed).to_json(), folder)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        from modulora_conformance.report import table_text

        for result in self.results() if self._found else ():
            terminalreporter.section(f"conformance of {result.quantizer}")
            terminal = terminalreporter._tw
            terminal.write(
                table_text(result.to_json(), terminal.fullwidth, color=terminal.hasmarkup)
            )


def golden_of(item: pytest.Item) -> Path | None:
    """The folder of golden vectors that an item's class or the command line names."""
    named: Path | None = getattr(item.cls, "golden", None) or item.config.getoption("--golden")  # type: ignore[attr-defined]
    return named


def _is_check(item: pytest.Item) -> bool:
    cls = getattr(item, "cls", None)
    return (
        cls is not None
        and issubclass(cls, Level)
        and (_function(item) == GUARD or _function(item) in _order(cls))
    )


def _function(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", None) or item.name)


def _order(cls: type) -> dict[str, int]:
    return {name: i for i, (name, _, _) in enumerate(checks_of(cls))}


def _level(item: pytest.Item) -> str:
    levels = {name: level.level for name, _, level in checks_of(item.cls)}  # type: ignore[attr-defined]
    return levels.get(_function(item), "L0")


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return dict(callspec.params) if callspec is not None else {}


def _key(item: pytest.Item) -> tuple[str, str]:
    """A class and a quantizer of its fixture."""
    parent = item.nodeid.split("::" + item.name)[0]
    return parent, repr([_parameters(item).get(name) for name in _FIXTURES])


def _case(item: pytest.Item) -> str:
    chosen = {name: value for name, value in _parameters(item).items() if name not in _FIXTURES}
    return ", ".join(
        str(getattr(value, "stem", value)).removeprefix("torch.") for value in chosen.values()
    )


def _title(quantizer: Quantizer) -> str:
    """The options that aren't at their defaults, in one line."""
    from modulora_core.spec import titled

    return titled(quantizer.options.model_dump(exclude_defaults=True))


def _is_complete(found: _Found) -> bool:
    """Whether each check that doesn't depend on golden vectors ran for each configuration that the spec makes promises for."""
    checks = {GUARD, *(name for name, _, _ in checks_of(found.cls) if not name.endswith(GOLDEN))}
    ran = {(o.configuration, o.check) for o in found.outcomes}
    configurations = _promised(found) | {o.configuration for o in found.outcomes}
    return all((title, check) in ran for title in configurations for check in checks)


def _promised(found: _Found) -> set[str]:
    """The configurations that the spec makes promises for, by title."""
    cls = type(found.quantizer)
    titles = set()
    for promise in cls.spec.promises:
        try:
            titles.add(_title(cls(cls.Options.model_validate(dict(promise.options)))))
        except ValidationError:  # a check says so
            titles.add(promise.title)
    return titles


def _kind(report: pytest.TestReport, error: BaseException | None) -> tuple[Kind, str]:
    if hasattr(report, "wasxfail"):
        if report.skipped:
            return "xfailed", str(report.wasxfail)
        return "failed", f"expected to fail, and passed: {report.wasxfail}"
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        return (
            ("blocked", reason.removeprefix(BLOCKED))
            if reason.startswith(BLOCKED)
            else ("skipped", reason)
        )
    if report.passed:
        return "passed", ""
    return "failed", _reason(report, error).removeprefix("AssertionError: ").removeprefix(
        "Failed: "
    )


def _reason(report: pytest.TestReport, error: BaseException | None) -> str:
    """One line on a failure: of several that Hypothesis found, the first, as what it says of all is only how many there are."""
    if isinstance(error, BaseExceptionGroup):
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        told = f"{type(error).__name__}: {error}"
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        told = str(crash.message if crash is not None else report.longrepr)
    return told.strip().partition("\n")[0]
