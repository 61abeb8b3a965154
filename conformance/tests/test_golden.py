"""Golden vectors: written once, they hold the bytes and their meaning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo_runs
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": zoo_runs.install(folder / "site")}
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    done = run(tmp_path, "modulora_conformance.golden", "zoo-healthy", "golden")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "golden").iterdir()
    assert done.stdout.strip() == str(path.relative_to(tmp_path))
    return path


def failures(folder: Path) -> set[str]:
    return set(outcomes(folder, "failed"))


def outcomes(folder: Path, kind: str) -> dict[str, str]:
    """The reasons of checks that ended so, by their names."""
    run(
        folder,
        "modulora_conformance",
        "zoo-healthy",
        "--level",
        "1",
        "--golden",
        "golden",
        "--report",
        "report",
    )
    report = json.loads((folder / "report" / "zoo-healthy.json").read_text())
    golden = [c["check"] for c in report["checks"] if c["check"].endswith("_golden_vectors")]
    assert sorted(golden) == [
        "test_packing_gives_the_golden_vectors",
        "test_tiles_give_the_golden_vectors",
    ]
    return {c["check"]: c["reason"] for c in report["checks"] if c["outcome"] == kind}


def test_what_was_just_written_holds(written: Path) -> None:
    assert failures(written.parents[1]) == set()


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("tile", {"test_tiles_give_the_golden_vectors"}),
        (
            "packed.codes",
            {"test_packing_gives_the_golden_vectors", "test_tiles_give_the_golden_vectors"},
        ),
    ],
)
def test_a_change_of_one_value_is_told(written: Path, name: str, broken: set[str]) -> None:
    with safe_open(written, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(written)
    tensors[name][3, 5] += 1
    save_file(tensors, written, metadata)
    assert failures(written.parents[1]) == broken


def test_another_format_is_one_failure_that_says_what_to_do(written: Path) -> None:
    with safe_open(written, "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    save_file(load_file(written), written, {"layout": json.dumps(layout | {"format": 3})})
    failed = outcomes(written.parents[1], "failed")
    assert failed.keys() == {"test_packing_gives_the_golden_vectors"}
    assert "format 3 -> 1: write the golden vectors anew" in failed.popitem()[1]
    skipped = outcomes(written.parents[1], "skipped")["test_tiles_give_the_golden_vectors"]
    assert "isn't read any more: format 3 -> 1" in skipped
