"""Runs pytest over the kit, for ``modulora conformance NAME``.

It uses the kit's own pytest settings, and ignores the settings of the current folder. The way from
a package to its certificate:

    test_conformance.py     the checks of each level, for the quantizer that was named
    pytest_plugin.py        pytest's options and fixtures of the kit
    recorder.py             orders the checks, and records their outcomes in a ``Run``
    covered/                counts the branches of the plugin's source that the checks ran
    results.py              ``Run``; its property ``sound`` decides about the certificate
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

SETTINGS = Path(__file__).parent / "pytest.ini"

QUIET = ("-q", "--no-header", "-rN", "-p", "no:cacheprovider", "-o", "console_output_style=classic")
"""The kit prints each failure itself, so pytest prints none; nor percents between the dots."""


def run(
    name: str, words: Sequence[str], report: Path | None
) -> tuple[int, dict[str, Any] | None, str]:
    """Run the checks of a quantizer.

    Args:
        name: the quantizer.
        words: further words for pytest.
        report: the folder for the reports; ``words`` have it too.

    Returns:
        pytest's exit code, the result as JSON has it, and a line about an error before the first
        check. The result is None if no check ran.
    """
    found = _Results()
    with tempfile.TemporaryDirectory() as scratch:
        # Hypothesis would create a folder in the current one
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", scratch)
        fixed = ["--pyargs", "modulora_conformance", *QUIET, "-c", str(SETTINGS)]
        junit = [f"--junit-xml={report / name}.xml"] if report is not None else []
        asked = [f"--quantizer={name}", *words]
        code = int(pytest.main([*fixed, *asked, *junit], plugins=[found, _Line()]))
    if code in (0, 1) and found.result is not None and report is not None:
        written = report / f"{name}.json"  # it has the measured speed too
        found.result = json.loads(written.read_text(encoding="utf-8"))
    return code, found.result, found.fault if found.result is None else ""


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

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, Any, Any]:
        if self._reporter is not None:
            self._reporter.rewrite("", erase=True)
        try:
            return (yield)
        except BaseException:
            print()  # an error's message does not go on the line of dots
            raise
