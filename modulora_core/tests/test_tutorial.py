"""docs/tutorial.md, followed step by step: what a reader has at the end measures, tests and certifies as the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from modulora_core.cli.new_plugin import new_plugin
from modulora_core.tests.markdown_blocks import blocks, commands, follow
from modulora_core.tests.plugin_sites import site_of

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
NAME = "feedback-rounding"

pytestmark = pytest.mark.skipif(not TUTORIAL.exists(), reason="the docs aren't here")

_ERRORS = re.compile(r"^(\d bits): ([\d.]+) without calibration, ([\d.]+) with$", re.MULTILINE)

needs_kit = pytest.mark.skipif(
    find_spec("modulora_conformance") is None, reason="modulora-conformance isn't installed"
)


def python(*words: str, folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin at the end of the tutorial."""
    out = tmp_path_factory.mktemp("tutorial") / NAME
    new_plugin(NAME, out)
    follow(TUTORIAL, out)
    return out


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_of(package, tmp_path_factory.mktemp("site"))


def errors(text: str) -> dict[str, list[float]]:
    return {
        bits: [float(plain), float(calibrated)] for bits, plain, calibrated in _ERRORS.findall(text)
    }


def test_measuring_gives_the_numbers_of_the_page(package: Path, site: Path) -> None:
    done = python("measure.py", folder=package, site=site)
    assert done.returncode == 0, done.stderr
    told = errors("".join(block.text for block in blocks(TUTORIAL, "console")))
    measured = errors(done.stdout)
    assert measured.keys() == told.keys() != set()
    for bits, values in measured.items():
        assert values == pytest.approx(told[bits], abs=2e-3)


def test_before_the_calibration_is_used_both_columns_are_equal(tmp_path: Path) -> None:
    new_plugin(NAME, tmp_path / "plugin")
    (measure,) = [block for block in blocks(TUTORIAL, "python") if block.title == "measure.py"]
    (tmp_path / "measure.py").write_text(measure.text)
    done = python(
        "measure.py", folder=tmp_path, site=site_of(tmp_path / "plugin", tmp_path / "site")
    )
    assert all(plain == calibrated for plain, calibrated in errors(done.stdout).values()), (
        done.stdout
    )


def test_its_tests_pass(package: Path, site: Path) -> None:
    words = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_feedback.py",
        "tests/test_feedback_rounding.py",
    )
    done = python(*words, folder=package, site=site)
    assert done.returncode == 0, done.stdout


@needs_kit
def test_the_kit_names_the_check_that_a_forgotten_refusal_fails(
    package: Path, tmp_path: Path
) -> None:
    """The failure that section 5 shows."""
    changed = site_of(package, tmp_path / "site")
    file = changed / "modulora_feedback_rounding" / "quantizer.py"
    without = re.sub(r"\n +check_hessian\(SPEC.*", "", file.read_text("utf-8"))
    file.write_text(without, "utf-8")
    words = ("-m", "modulora_conformance", NAME, "--level", "1", "-o", "bits=2")
    done = python(*words, folder=tmp_path, site=changed)
    (shown,) = [block.text for block in blocks(TUTORIAL, "text") if "FAILED" in block.text]
    told = [line for line in done.stdout.splitlines() if line.startswith("FAILED L")]
    assert [line.partition(": ")[0] for line in told] == [shown.partition(": ")[0]], done.stdout


@needs_kit
@pytest.mark.slow
def test_the_plugin_is_certified_at_the_end(package: Path, site: Path, tmp_path: Path) -> None:
    done = python("-m", "modulora_conformance", NAME, "--certified", folder=tmp_path, site=site)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff isn't installed")
def test_the_code_is_formatted(package: Path, site: Path) -> None:
    done = python("-m", "ruff", "check", "--isolated", ".", folder=package, site=site)
    assert done.returncode == 0, done.stdout
    done = python("-m", "ruff", "format", "--isolated", "--diff", ".", folder=package, site=site)
    assert done.returncode == 0, done.stdout


def test_every_command_of_the_page_parses() -> None:
    """If this fails: the page names a command or an option that isn't there."""
    from modulora_core.cli.app import load_command

    found = [shlex.split(command) for command in commands(TUTORIAL)]
    words = [word[1:] for word in found if word[0] == "modulora"]
    assert {"new-plugin", "conformance", "quantize", "evaluate"} <= {word[0] for word in words}
    for word in words:
        load_command(word[0]).make_context(word[0], word[1:])
