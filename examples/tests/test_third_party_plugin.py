"""Builds, installs and checks ``examples/third_party_plugin``, as an outsider's CI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).parents[1] / "third_party_plugin"


def run(folder: Path, site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed from a wheel of its own, and nothing else."""
    pytest.importorskip("hatchling", reason="builds a wheel without network: pip install hatchling")
    folder = tmp_path_factory.mktemp("outsider")
    words = [
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        "site",
        str(PLUGIN),
    ]
    done = run(folder, folder, *words)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.slow
def test_it_passes_its_own_tests(site: Path, tmp_path: Path) -> None:
    settings, certified = (
        PLUGIN / "pyproject.toml",
        PLUGIN / "tests" / "test_half_quadratic_conformance.py",
    )
    words = [
        "pytest",
        str(PLUGIN / "tests"),
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(settings),
        "--ignore",
        str(certified),
    ]
    done = run(tmp_path, site, *words)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def conformance(site: Path, folder: Path, *words: str) -> dict[str, Any]:
    done = run(folder, site, "modulora_core.cli", "conformance", "half-quadratic", "--json", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_it_passes_the_kit_and_leaves_a_report(site: Path, tmp_path: Path) -> None:
    result = conformance(site, tmp_path, "-o", "bits=3", "--report", "report")
    assert result["distribution"] == "modulora-half-quadratic"
    assert result["failures"] == []
    assert result["levels"].keys() == {f"L{level}" for level in range(8)}
    assert (tmp_path / "report" / "half-quadratic.html").is_file()


@pytest.mark.slow
def test_it_keeps_the_promise_of_each_width(site: Path, tmp_path: Path) -> None:
    result = conformance(site, tmp_path, "-k", "test_the_error_keeps_the_promise")
    assert len(result["configurations"]) >= 5


def test_no_file_of_the_core_knows_it() -> None:
    core = PLUGIN.parents[1] / "modulora_core"
    texts = {
        path: path.read_text("utf-8").lower()
        for path in core.rglob("*.py")
        if "tests" not in path.relative_to(core).parts
    }
    naming = [
        str(path)
        for path, text in texts.items()
        if "modulora_half_quadratic" in text or "hqq" in text
    ]
    assert naming == []
