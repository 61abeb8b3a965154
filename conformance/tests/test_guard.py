"""What a subclass may take from the kit, and what a run says on the command line: nothing silently, and certified only when all holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zoo_runs

GUARD = "test_no_check_is_overridden_or_deleted"


def kit(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m modulora_conformance`` where the zoo is installed."""
    environment = {**os.environ, "PYTHONPATH": zoo_runs.install(folder / "site")}
    command = [sys.executable, "-m", "modulora_conformance", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The outcome of each test of guarded/check_guard.py, as pytest lists them."""
    folder = tmp_path_factory.mktemp("guarded")
    environment = {**os.environ, "PYTHONPATH": zoo_runs.install(folder)}
    file = Path(__file__).parent / "guarded" / "check_guard.py"
    words = [sys.executable, "-m", "pytest", str(file), "-v", "-p", "no:cacheprovider", "-c", str(zoo_runs.SETTINGS), "--rootdir",
             str(file.parent), "--conformance-level", "0", "-k", f"{GUARD} or protocol or unknown or described"]  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder).stdout


@pytest.mark.parametrize(
    ("cls", "check", "outcome"),
    [
        ("TestNothingTaken", GUARD, "PASSED"),
        ("TestOverrides", GUARD, "FAILED"),
        ("TestDeletes", GUARD, "FAILED"),
        ("TestOverridesTheGuard", GUARD, "FAILED"),
        ("TestOverridesWithoutReason", GUARD, "FAILED"),
        ("TestOverridesWithoutStrict", GUARD, "FAILED"),
        ("TestChangesALevel", GUARD, "FAILED"),
        ("TestSaysWhy", GUARD, "PASSED"),
        ("TestSaysWhy", "test_unknown_and_malformed_options_are_refused", "XFAIL"),
        ("TestSaysWhyWithoutCause", GUARD, "PASSED"),
        ("TestSaysWhyWithoutCause", "test_the_protocol_is_supported", "FAILED"),
    ],
)
def test_what_is_taken_from_the_kit_is_told(
    guarded: str, cls: str, check: str, outcome: str
) -> None:
    found = re.search(rf"{cls}::{check} (\w+)", guarded)
    assert found is not None, guarded
    assert found[1] == outcome


def test_a_run_prints_its_seed_and_a_failing_case_in_its_smallest_form(tmp_path: Path) -> None:
    done = kit(tmp_path, "zoo-few-rows-without-zero", "--level", "3")
    assert done.returncode == 1, done.stdout
    seed = re.search(r"--hypothesis-seed=(\d+)", done.stdout)
    assert seed is not None, done.stdout
    # it fails for every weight at so few rows: what Hypothesis shows is the smallest that the quantizer takes
    assert "[1, 2], 1 rows" in done.stdout, done.stdout


def test_a_part_of_the_kit_certifies_nothing(tmp_path: Path) -> None:
    passed = kit(tmp_path, "zoo-healthy", "--level", "1")
    assert passed.returncode == 0, passed.stdout
    assert "No golden vectors were held" in passed.stdout
    certified = kit(tmp_path, "zoo-healthy", "--level", "1", "--certified", "--report", "report")
    assert certified.returncode == 1, certified.stdout
    assert "Not certified" in certified.stdout
    report = json.loads((tmp_path / "report" / "zoo-healthy.json").read_text())
    assert report["failures"] == []
    assert report["certified"] is False
    assert (tmp_path / "report" / "zoo-healthy.xml").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["zoo-helthy"], "did you mean 'zoo-healthy'"),
        (["zoo-healthy", "-o", "group_size"], "expected key=value"),
        (["zoo-healthy", "--level", "9"], "invalid choice"),
    ],
)
def test_a_wrong_request_is_told_before_any_check(
    words: list[str], told: str, tmp_path: Path
) -> None:
    done = kit(tmp_path, *words)
    assert done.returncode not in (0, 1)
    assert told in done.stdout + done.stderr
    assert "passed" not in done.stdout
