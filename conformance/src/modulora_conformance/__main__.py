"""Runs pytest over the kit: ``python -m modulora_conformance NAME``.

It uses the kit's own pytest settings, and ignores the settings of the current folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

SETTINGS = Path(__file__).parent / "pytest.ini"

TRACEBACKS = ("no", "short", "long", "line", "native", "auto")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks. Returns pytest's exit code: 0 all passed, 1 some failed, 4 wrong request."""
    code, _, fault = run(arguments)
    if fault:
        print(fault, file=sys.stderr)
    return code


def run(arguments: Sequence[str] | None = None) -> tuple[int, dict[str, Any] | None, str]:
    """Run the checks.

    Returns:
        pytest's exit code, the result as JSON has it, and a line about an error before the first
        check. The result is None if no check ran.
    """
    asked, found = _parser().parse_args(arguments), _Results()
    with tempfile.TemporaryDirectory() as scratch:
        # Hypothesis would create a folder in the current one
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", scratch)
        code = int(pytest.main(_words(asked), plugins=[found, _Line()]))
    if code in (0, 1) and found.result is not None and asked.report is not None:
        report = asked.report / f"{asked.name}.json"  # it has the measured speed too
        found.result = json.loads(report.read_text(encoding="utf-8"))
    return code, found.result, found.fault if found.result is None else ""


def _words(asked: argparse.Namespace) -> list[str]:
    """The command line of pytest. The kit prints each failure itself, so pytest prints none."""
    words = ["--pyargs", "modulora_conformance", "-q", "--no-header", "-p", "no:cacheprovider"]
    words += ["-o", "console_output_style=classic"]  # without percents between the dots
    words += ["-c", str(SETTINGS), "-rN", f"--tb={asked.tb}", "--quantizer", asked.name]
    words += [f"--conformance-level={asked.level}"]
    words += [f"--quantizer-option={option}" for option in asked.option]
    words += ["-k", asked.select] if asked.select else []
    words += ["--exitfirst"] if asked.exitfirst else []
    words += [f"--golden={asked.golden}"] if asked.golden else []
    words += [f"--hypothesis-seed={asked.seed}"] if asked.seed is not None else []
    words += ["--certified"] if asked.certified else []
    if asked.report:
        junit = asked.report / f"{asked.name}.xml"
        words += [f"--conformance-report={asked.report}", f"--junit-xml={junit}"]
    return words


class _Results:
    """A plugin of pytest that takes the result from the recorder, and the first early error."""

    result: dict[str, Any] | None = None
    fault = ""

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "setup":
            self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed and not self.fault:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else report.longreprtext
            self.fault = text.strip().splitlines()[-1].removeprefix("E ").strip()

    def pytest_unconfigure(self, config: Any) -> None:
        recorder = config.pluginmanager.get_plugin("modulora_conformance_recorder")
        for run in recorder.runs() if recorder is not None else ():
            self.result = run.model_dump(mode="json")


class _Line:
    """A plugin of pytest that shows the running check and the count on one line of a terminal.

    It takes the place of dots. A thread that draws would disturb checks that count allocations.
    """

    _reporter: Any = None

    def pytest_collection_finish(self, session: Any) -> None:
        self._all, self._begun, self._failed = len(session.items), 0, 0
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and reporter.isatty:
            self._reporter = reporter

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begun += 1
        if self._reporter is not None:
            check = nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            failed = f", {self._failed} failed" if self._failed else ""
            line = f"check {self._begun} of {self._all}{failed}: {check}"
            self._reporter.rewrite(line[: shutil.get_terminal_size().columns - 1], erase=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Generator[None, Any, Any]:
        category, letter, word = yield
        self._failed += category in ("failed", "error")
        return (category, letter, word) if self._reporter is None else (category, "", "")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        if self._reporter is not None:
            self._reporter.rewrite("", erase=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modulora_conformance", description="Check a ModuLoRA quantizer."
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="the quantizer")
    add("-o", "--option", metavar="KEY=VALUE", action="append", default=[], help="an option of it")
    add("--level", metavar="N", type=int, choices=range(8), default=7, help="run levels 0 to N")
    add("-k", dest="select", metavar="EXPRESSION", help="run the checks whose names match, as -k")
    add("-x", "--exitfirst", action="store_true", help="stop at the first failure")
    add("--tb", choices=TRACEBACKS, default="no", help="show tracebacks in this style")
    add("--report", metavar="DIR", type=Path, help="write the reports to DIR")
    add("--golden", metavar="DIR", type=Path, help="compare with the golden vectors in DIR")
    add("--seed", metavar="N", type=int, help="Hypothesis's seed, to repeat a run")
    add("--certified", action="store_true", help="allow skips for missing hardware only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
