"""Following docs/tutorials/publish-a-quantizer.md gives a package that passes the kit."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from modulora_conformance.commands.new_plugin import new_plugin

from modulora_core.tests.markdown_blocks import blocks, follow
from modulora_core.tests.plugin_sites import site_of

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "publish-a-quantizer.md"
NAME = "feedback-rounding"

pytestmark = [
    pytest.mark.skipif(not TUTORIAL.exists(), reason="an installed package has no docs"),
    pytest.mark.skipif(find_spec("modulora_conformance") is None, reason="the kit is missing"),
]

_ERRORS = re.compile(r"^(\d bits): ([\d.]+) without calibration, ([\d.]+) with$", re.MULTILINE)


def python(*words, folder, site):
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package at the end of the tutorial."""
    out = tmp_path_factory.mktemp("tutorial") / NAME
    new_plugin(NAME, out)
    follow(TUTORIAL, out)
    return out


@pytest.fixture(scope="module")
def site(package, tmp_path_factory):
    return site_of(package, tmp_path_factory.mktemp("site"))


def errors(text):
    """The errors without and with calibration, by bits."""
    return {bits: [float(plain), float(with_H)] for bits, plain, with_H in _ERRORS.findall(text)}


def test_measuring_gives_the_numbers_of_the_page(package, site):
    done = python("measure.py", folder=package, site=site)
    promised = errors("".join(block.text for block in blocks(TUTORIAL, "console")))
    measured = errors(done.stdout)
    assert measured.keys() == promised.keys() != set(), done.stderr
    for bits, values in measured.items():
        assert values == pytest.approx(promised[bits], abs=2e-3)


def test_the_tests_of_the_package_pass(package, site):
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_feedback_rounding.py")
    done = python(*words, folder=package, site=site)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_package_passes_the_kit_at_the_end(package, site, tmp_path):
    """With the promise of step 6; the other promises are the template's, which another test has."""
    words = ("-m", "modulora_conformance", NAME, "-o", "bits=3")
    done = python(*words, folder=tmp_path, site=site)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "spec.promises has no entry" not in done.stdout
