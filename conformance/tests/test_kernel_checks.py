"""The checks for kernels against quantizers that are broken on purpose: each fails the one made for it; sound ones fail none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zoo_kernels
import zoo_runs
from modulora_conformance.compiled_kernels import CompiledKernels

pytest.importorskip("numba")
CHECKS = zoo_runs.ZOO / "check_zoo_kernels.py"


def outcomes(folder: Path, *nodes: str, **environment: str) -> dict[str, str]:
    """Of the tests that are named (``Class`` or ``Class::test``), in one process."""
    env = {**os.environ, "PYTHONPATH": zoo_runs.install(folder / "site"), **environment}
    words = [sys.executable, "-m", "pytest", "-rA", "--tb=line", "-p", "no:cacheprovider", "-c", str(zoo_runs.SETTINGS),
             "--rootdir", str(zoo_runs.ZOO), *(f"{CHECKS}::{node}" for node in nodes)]  # fmt: skip
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return {node: outcome for outcome, node in found}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    broken = [f"Test{name}::{test}" for name, test in zoo_kernels.BREAKS.items()]
    broken = [
        f"{node}[kernels]" if "packing" in node else node for node in broken
    ]  # once: it takes seconds
    return outcomes(tmp_path_factory.mktemp("kernels"), "TestSound", *broken)


def test_a_sound_one_passes_every_check(compiled: dict[str, str]) -> None:
    sound = {node: outcome for node, outcome in compiled.items() if node.startswith("TestSound::")}
    assert set(sound.values()) == {"PASSED"}, sound
    assert len(sound) >= len(zoo_kernels.BREAKS)


@pytest.mark.parametrize("name", zoo_kernels.BREAKS)
def test_a_broken_one_fails_the_check_made_for_it(name: str, compiled: dict[str, str]) -> None:
    found = [outcome for node, outcome in compiled.items() if node.startswith(f"Test{name}::")]
    assert set(found) == {"FAILED"}


def test_every_check_is_broken_by_some_quantizer() -> None:
    checks = {name for name in vars(CompiledKernels) if name.startswith("test_")}
    assert checks == set(zoo_kernels.BREAKS.values())


def test_interpreted_kernels_that_leave_columns_out_are_found(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = outcomes(tmp_path, "TestInTriton", "TestWithoutMask", TRITON_INTERPRET="1")
    failed = {node.partition("[")[0] for node, outcome in found.items() if outcome == "FAILED"}
    broken = {
        "TestWithoutMask::test_tiles_are_the_reference_bit_for_bit",
        "TestWithoutMask::test_products_are_those_of_the_reference",
    }
    assert failed == broken
