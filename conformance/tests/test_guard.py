"""The guard over subclasses, and the command line: no check is lost silently."""

import json
import subprocess
import sys

import pytest
from modulora_conformance import recorder
from modulora_conformance.__main__ import main
from modulora_conformance.checks import GUARD, checks_of, meanings
from modulora_conformance.run import SETTINGS, run
from modulora_conformance.suite import QuantizerConformance

UNKNOWN = "test_unknown_and_malformed_options_are_refused"
PROTOCOL = "test_the_protocol_is_supported"

TESTS = {
    f"TestNothingTaken::{GUARD}": "passed",
    f"TestOverrides::{GUARD}": "failed",
    f"TestDeletes::{GUARD}": "failed",
    f"TestOverridesTheGuard::{GUARD}": "failed",
    f"TestOverridesWithoutReason::{GUARD}": "failed",
    f"TestOverridesWithoutStrict::{GUARD}": "failed",
    f"TestChangesALevel::{GUARD}": "failed",
    f"TestSaysWhy::{GUARD}": "passed",
    f"TestSaysWhy::{UNKNOWN}": "xfailed",
    f"TestSaysWhyWithoutCause::{GUARD}": "passed",
    f"TestSaysWhyWithoutCause::{PROTOCOL}": "failed",
}


def test_a_check_is_overridden_only_with_a_strict_xfail_and_its_reason(nested):
    assert nested(*TESTS).outcomes == TESTS


def test_a_parametrized_class_has_a_configuration_for_each_quantizer(nested):
    check = "test_weights_that_are_not_finite_are_refused"  # it has cases of its own
    run = nested(f"TestParametrized::{check}").runs["zoo-healthy"]
    assert run.configurations == ("group_size=16", "group_size=64")
    assert "nan" in {outcome.case for outcome in run.checks}


def test_every_check_says_why_it_fails():
    said = meanings(QuantizerConformance)
    assert said.keys() == {GUARD} | {name for name, _, _ in checks_of(QuantizerConformance)}
    assert [name for name, text in said.items() if not text.startswith("If this fails")] == []


def test_a_failing_run_prints_its_seed_and_the_smallest_case(zoo, capsys):
    words = ["zoo-few-rows-without-zero", "--seed", "5"]
    assert main([*words, "-k", "test_the_product_equals_the_dense_one"]) == 1
    printed = capsys.readouterr().out
    assert "--hypothesis-seed=5" in printed
    # it fails for every weight at few rows: Hypothesis shows the smallest that it accepts
    assert "[1, 2], 1 rows" in printed


def test_a_part_of_the_kit_certifies_nothing(zoo, tmp_path, capsys):
    assert main(["zoo-healthy", "--level", "0"]) == 0
    words = ["zoo-healthy", "-o", "group_size=16", "--level", "0"]
    asked = ["--quantizer-option=group_size=16", "--conformance-level=0", "--hypothesis-seed=5"]
    asked += ["--certified", f"--conformance-report={tmp_path}"]  # which the command refuses
    assert run("zoo-healthy", asked, tmp_path)[0] == 1
    printed = capsys.readouterr().out
    assert "Passed, not certified: this run left out some checks" in printed
    assert f"To repeat: modulora conformance {' '.join(words)} --seed 5 (" in printed
    report = json.loads((tmp_path / "zoo-healthy.json").read_text())
    assert report["failures"] == []
    assert report["certified"] is False
    assert report["configurations"] == ["group_size=16"]
    assert report["speed"]["group_size=16"]["timings"]
    assert report["partial"]["defaults"] == [f"L{n}" for n in range(10)]
    assert report["partial"]["group_size=16"] == [f"L{n}" for n in range(1, 10)]
    names = {f"zoo-healthy.{suffix}" for suffix in ("html", "json", "md", "svg", "xml")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_case_that_was_deselected_is_missed(zoo, monkeypatch, capsys):
    """Each check has an outcome then, which looks as if all of it had run."""
    monkeypatch.setattr(recorder, "_missing", lambda subjects: {"defaults": set()})
    words = ["-k", "test_weights_that_are_not_finite and not nan", "--certified"]
    assert run("zoo-healthy", words, None)[0] == 1
    assert "Passed, not certified: this run left out some checks" in capsys.readouterr().out


IN_PROCESSES = """
from modulora_conformance import QuantizerConformance
from modulora_zoo.healthy import Healthy
import pytest

class TestHealthy(QuantizerConformance):
    @pytest.fixture
    def quantizer(self):
        return Healthy()
"""


@pytest.mark.parametrize(
    ("tests", "words", "code", "message"),
    [
        ("def test_it(): pass", "", 1, "expected a subclass of QuantizerConformance, got none"),
        ("def test_it(): pass", "-n 1 --dist loadfile", 1, "QuantizerConformance, got none"),
        (IN_PROCESSES, "-n 1 --dist loadfile --conformance-level 0", 1, "passed"),
        (IN_PROCESSES, "-n 1", 4, "with --dist load; add --dist loadfile, or leave -n out"),
    ],
)
def test_a_certified_run_fails_without_a_certificate(zoo, tmp_path, tests, words, code, message):
    """Also if processes of pytest-xdist run the checks."""
    (tmp_path / "test_it.py").write_text(tests)
    fixed = ["-q", "-p", "no:cacheprovider", "-c", str(SETTINGS), "--certified", *words.split()]
    command = [sys.executable, "-m", "pytest", *fixed, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == code
    assert message in ran.stdout + ran.stderr
