"""``modulora conformance``: the kit in its own process, and what is refused before that is started."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from modulora_core.cli import main
from modulora_core.tests.conftest import TOY_FORMAT, TOY_INIT, TOY_QUANTIZER, install_package

KIT = "modulora_conformance"

needs_kit = pytest.mark.skipif(
    importlib.util.find_spec(KIT) is None, reason="modulora-conformance isn't installed"
)

PROMISED_KEYS = {"quantizer", "suite", "protocol", "certified", "levels", "failures"}


def conformance(site: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process that has the packages in ``site``."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "modulora_core.cli", "conformance", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=site,
        timeout=300,
    )


@needs_kit
def test_a_run_prints_the_result_alone_and_leaves_the_reports(
    toy_root: Path, tmp_path: Path
) -> None:
    ran = conformance(toy_root, "toy", "--level", 0, "-o", "levels=7", "--seed", 5, "--report", tmp_path, "--json")  # fmt: skip
    told = json.loads(ran.stdout)
    assert told.keys() >= PROMISED_KEYS
    assert told["quantizer"] == "toy"
    assert told["configurations"] == ["levels=7"]
    assert told["seed"] == "5"
    assert told["levels"].keys() == {"L0"}
    assert sum(told["levels"]["L0"][kind] for kind in ("passed", "failed", "skipped")) > 5
    assert ran.returncode == (1 if told["failures"] else 0), ran.stderr
    assert "conformance of toy" in ran.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"toy.{suffix}" for suffix in ("json", "html", "svg", "md", "xml")}


@needs_kit
def test_a_failed_check_is_on_the_terminal_and_in_the_exit_code(tmp_path: Path) -> None:
    site = tmp_path / "site"
    files = {
        "__init__.py": "import torch\n" + TOY_INIT,
        "quantizer.py": TOY_QUANTIZER,
        "crude.py": TOY_FORMAT,
    }
    install_package(site, "modulora-toy", "toy", "modulora_toy", files)  # a hook that imports torch
    before = sorted(site.rglob("*"))
    ran = conformance(site, "toy", "--level", 0)
    assert ran.returncode == 1, ran.stderr
    assert "FAILED L0 " in ran.stdout
    assert "torch" in ran.stdout
    left = [
        path
        for path in sorted(site.rglob("*"))
        if path not in before and "__pycache__" not in path.parts
    ]
    assert left == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tyo"], "did you mean 'toy'"),
        (["toy", "-o", "level=3"], "levels"),
        (["toy", "-o", "levels=1000"], "levels"),
        (["toy", "--level", "8"], "--level"),
        (["toy", "--level", "3", "--certified"], "--certified: expected all levels"),
        (["toy", "--golden", "missing"], "--golden"),
        (["toy", "--report", "{file}"], "--report"),
    ],
)
@needs_kit
def test_a_wrong_request_is_refused_before_any_check(
    toy: ModuleType,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "file").touch()
    code = main(["conformance", *(word.format(file=tmp_path / "file") for word in words), "--json"])
    printed = capfd.readouterr()
    assert code == 2
    assert message in json.loads(printed.out)["error"]["message"]
    assert "passed" not in printed.err


def test_without_the_kit_it_says_what_to_install(
    toy: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, KIT, None)  # as Python marks what can't be imported
    assert main(["conformance", "toy", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "MissingExtraError"
    assert "pip install modulora-conformance" in error["message"]
