"""Orders the checks, skips those that cannot tell anything new, and records the outcomes."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from modulora_conformance import SUITE
from modulora_conformance.checks import about, meanings, needed_by
from modulora_conformance.items import (
    case_of,
    class_of,
    golden_of,
    is_check,
    key_of,
    level_of,
    levels_of,
    name_of,
)
from modulora_conformance.levels import HIGHEST
from modulora_conformance.results import (
    GOLDEN,
    Branches,
    Kind,
    Measurements,
    Outcome,
    Run,
)

if TYPE_CHECKING:
    from modulora_conformance.covered.branches import Source
    from modulora_core.spec import Quantizer

MEASUREMENTS = pytest.StashKey[Measurements]()

BLOCKED = "blocked: "

CERTIFIED = "modulora_certified"
"""The key in the output of a process of pytest-xdist: whether each of its runs was certified."""

PACKAGES = (
    "modulora-core",
    "modulora-conformance",
    "torch",
    "transformers",
    "numba",
    "triton",
    "pytest",
    "hypothesis",
)


@dataclass
class Subject:
    """A quantizer with its options, in one class of checks."""

    quantizer: Quantizer
    cls: type
    outcomes: list[Outcome] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    @property
    def configuration(self) -> str:
        return _title(self.quantizer)


class Recorder:
    """Records one run of pytest. It leaves tests that are no checks alone."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._partial: set[tuple[type, str]] = set()
        self._certified: list[bool] = []
        self._sources: dict[str, Source] = {}
        self._branches: dict[str, Branches] = {}

    def runs(self) -> Iterator[Run]:
        """One for each quantizer, in the order of their first checks."""
        names = dict.fromkeys(s.quantizer.spec.name for s in self._subjects.values())
        for name in names:
            yield self._run([s for s in self._subjects.values() if s.quantizer.spec.name == name])

    def _run(self, subjects: list[Subject]) -> Run:
        spec, cls = subjects[0].quantizer.spec, subjects[0].cls
        distribution, of_version = origin_of(spec.name)
        cut = {level for of, level in self._partial if of is cls}
        partial = {
            title: tuple(sorted(cut | missing)) for title, missing in _missing(subjects).items()
        }
        run = Run(
            quantizer=spec.name,
            suite=SUITE,
            protocol=spec.protocol,
            distribution=distribution,
            version=of_version,
            devices=spec.devices,
            certified=False,
            complete=not any(partial.values()),
            partial=partial,
            checks=tuple(outcome for subject in subjects for outcome in subject.outcomes),
            branches=self._branches.get(spec.name),
            seed=str(self._config.getoption("hypothesis_seed", "")),
            only=_only(self._config),
            environment=environment(),
            about=about(cls),
            meanings=meanings(cls),
        )
        certified = self._config.getoption("--certified") and run.sound
        return run.model_copy(update={"certified": certified})

    # -- collection

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if is_check(item) and self._is_left_out(item)]
        if left_out:
            self._config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
        first: dict[object, int] = {}
        for position, item in enumerate(items):
            first.setdefault(class_of(item) if is_check(item) else item, position)

        def key(item: pytest.Item) -> tuple[int, int]:
            if not is_check(item):
                return first[item], 0
            return first[class_of(item)], list(levels_of(class_of(item))).index(name_of(item))

        items.sort(key=key)

    def _is_left_out(self, item: pytest.Item) -> bool:
        if int(level_of(item)[1:]) > self._config.getoption("--conformance-level"):
            return True
        if self._config.getoption("--quick") and item.get_closest_marker("instrument"):
            return True
        return name_of(item).endswith(GOLDEN) and golden_of(item) is None

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note the levels without a check, or without a case of one: they are incomplete."""
        self._partial |= {
            (class_of(item), level_of(item))
            for item in items
            if is_check(item) and not name_of(item).endswith(GOLDEN)
        }

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start what checks of other processes need, beside the checks before them."""
        if any(is_check(item) and level_of(item) >= "L6" for item in session.items):
            from modulora_conformance.elsewhere import start_server

            start_server()

    # -- running

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        subject = self._subjects.get(key_of(item)) if is_check(item) else None
        if subject is not None:
            needed = needed_by(getattr(subject.cls, name_of(item)), level_of(item))
            failed = [name for name in needed if name in subject.failed]
            if failed:
                pytest.skip(f"{BLOCKED}{', '.join(failed)} failed before")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Watch the calls of a check. Record the branches that it runs too, if all checks run."""
        quantizer = getattr(item, "funcargs", {}).get("quantizer")
        if quantizer is None or not is_check(item):
            return (yield)
        from modulora_conformance.watching import blaming, findings_of, watching

        found = findings_of(item)
        with watching(type(quantizer), found, item.name), blaming(found):
            return (yield from self._recorded(quantizer))

    def _recorded(self, quantizer: Quantizer) -> Generator[None, Any, Any]:
        if self._partial or not self._config.getoption("--branches"):
            return (yield)
        from modulora_conformance.covered.branches import Source
        from modulora_conformance.covered.recording import recording

        name = quantizer.spec.name
        if name not in self._sources:
            self._sources[name] = Source(quantizer)
        with recording(self._sources[name].recorder):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if is_check(item) and report.when == "call" and report.passed:
            from modulora_conformance.watching import note_output  # it imports torch

            note_output(item, report.capstdout + report.capstderr)
        if is_check(item) and (report.when == "call" or not report.passed):
            self._record(item, report, None if call.excinfo is None else call.excinfo.value)
        return report

    def _record(
        self, item: pytest.Item, report: pytest.TestReport, error: BaseException | None
    ) -> None:
        quantizer = getattr(item, "funcargs", {}).get("quantizer")
        if quantizer is not None:
            self._subjects.setdefault(key_of(item), Subject(quantizer, class_of(item)))
        if key_of(item) not in self._subjects:
            return  # the fixture itself failed, and pytest reports that
        subject = self._subjects[key_of(item)]
        kind, reason = _kind(report, error)
        if kind in ("failed", "blocked"):
            subject.failed.add(name_of(item))
        collected = item.stash.get(MEASUREMENTS, Measurements())
        measured = tuple(collected.worst.values())
        item.user_properties += [(f"modulora:{found.name}", found.value) for found in measured]
        subject.outcomes.append(
            Outcome(
                level=level_of(item),
                check=name_of(item),
                case=case_of(item),
                configuration=subject.configuration,
                outcome=kind,
                reason=reason,
                seconds=round(report.duration, 4),
                measurements=measured,
                notes=tuple(collected.notes),
            )
        )

    # -- the end

    @pytest.hookimpl(optionalhook=True)  # of pytest-xdist
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a process found. A process that crashed has no output."""
        self._certified += getattr(node, "workeroutput", {}).get(CERTIFIED, [])

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._count_branches()
        runs = list(self.runs())
        self._certified += [run.certified for run in runs]
        if hasattr(self._config, "workeroutput"):  # of pytest-xdist, for the main process
            self._config.workeroutput[CERTIFIED] = self._certified
        elif self._config.getoption("--certified"):
            fails = not self._certified or not all(self._certified)
            if fails and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        folder = self._config.getoption("--conformance-report")
        if folder is not None:
            for run in runs:
                self._write(run, folder)

    def _count_branches(self) -> None:
        """Count the branches of each quantizer whose checks all ran."""
        for run in list(self.runs()):
            source = self._sources.get(run.quantizer)
            if source is not None and run.complete:
                of = [s.quantizer for s in self._subjects.values()]
                options = [
                    q.options.model_dump(mode="json") for q in of if q.spec.name == run.quantizer
                ]
                self._branches[run.quantizer] = source.branches(options)

    def _write(self, run: Run, folder: Path) -> None:
        from modulora_conformance.bench.quantizer_bench import measure_speed
        from modulora_conformance.report import write_report

        subjects = {
            s.configuration: s.quantizer
            for s in self._subjects.values()
            if s.quantizer.spec.name == run.quantizer
        }
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        speed = {}
        if hasattr(self._config, "workerinput"):
            subjects = {}  # of pytest-xdist, beside other processes: times mean nothing
        if reporter is not None:
            reporter.line("")  # ends the line of dots
        for number, (name, quantizer) in enumerate(subjects.items(), 1):
            if reporter is not None:
                reporter.write_line(f"measuring speed, {number} of {len(subjects)}: {name}")
            speed[name] = measure_speed(quantizer)
        found = {name: measured for name, measured in speed.items() if measured}
        write_report(run.model_copy(update={"speed": found}), folder)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Generator[None]:
        """Print the summary above the tracebacks, if these are asked for."""
        from modulora_conformance.report.terminal import summary_text

        if self._config.getoption("--certified") and not self._certified:
            terminalreporter.write_line(
                "--certified: expected a subclass of QuantizerConformance, got none; name its file"
            )
        for run in self.runs():
            terminalreporter.section(f"conformance of {run.quantizer}")
            text = summary_text(
                run,
                shutil.get_terminal_size().columns,
                color=terminalreporter.hasmarkup,
                failures=not terminalreporter.hasopt("f"),  # else pytest lists them
            )
            terminalreporter.write(text)
        return (yield)


@cache
def environment() -> dict[str, Any]:
    """Versions of packages (None if not installed), Python, system, processor and accelerators."""
    import torch

    from modulora_conformance.bench.timing import device_name

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(count)],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def origin_of(quantizer: str) -> tuple[str, str]:
    """The distribution of a quantizer and its version; ``("", "")`` if it is not registered."""
    from modulora_core.registry import entries

    found = (entry for entry in entries() if entry.name == quantizer)
    return next(((entry.distribution, entry.version) for entry in found), ("", ""))


def _title(quantizer: Quantizer) -> str:
    """The options that are not at their defaults, in one line."""
    from modulora_core.spec import titled

    return titled(quantizer.options.model_dump(exclude_defaults=True))


def _missing(subjects: list[Subject]) -> dict[str, set[str]]:
    """The levels without an outcome of some check, by configuration, and by each promised one."""
    levels = {n: level for n, level in levels_of(subjects[0].cls).items() if not n.endswith(GOLDEN)}
    outcomes = [outcome for subject in subjects for outcome in subject.outcomes]
    titles = {outcome.configuration for outcome in outcomes} | _promised(subjects[0].quantizer)
    ran = {(outcome.configuration, outcome.check) for outcome in outcomes}
    return {
        title: {level for name, level in levels.items() if (title, name) not in ran}
        for title in sorted(titles)
    }


def _only(config: pytest.Config) -> str:
    """The words of ``modulora conformance`` that choose what pytest's options chose."""
    words = [word for option in config.getoption("--quantizer-option") for word in ("-o", option)]
    level, select = config.getoption("--conformance-level"), config.getoption("keyword")
    words += [] if level == HIGHEST else ["--level", str(level)]
    return shlex.join(words + (["-k", select] if select else []))


def _promised(quantizer: Quantizer) -> set[str]:
    """The configurations that the spec makes promises for."""
    cls, titles = type(quantizer), set()
    for promise in cls.spec.promises:
        try:
            titles.add(_title(cls(cls.Options.model_validate(dict(promise.options)))))
        except ValidationError:  # a check reports it
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
        kind: Kind = "blocked" if reason.startswith(BLOCKED) else "skipped"
        return kind, reason.removeprefix(BLOCKED)
    return ("passed", "") if report.passed else ("failed", _reason(report, error))


def _reason(report: pytest.TestReport, error: BaseException | None) -> str:
    """One line about a failure; of several that Hypothesis found, the first."""
    if isinstance(error, BaseExceptionGroup):
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        message = f"{type(error).__name__}: {error}"
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else report.longrepr)
    line = message.strip().partition("\n")[0]
    return line.removeprefix("AssertionError: ").removeprefix("Failed: ")
