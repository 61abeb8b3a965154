"""Kernels are stored on disk, and run where nothing can be stored."""

import importlib
import sys

import pytest

MODULE = """
from modulora_kernels import jit

@jit()
def twice(x):
    return 2 * x
"""


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """Import a module with a kernel anew, and run the kernel."""
    pytest.importorskip("numba")
    (tmp_path / "doubling.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def run():
        sys.modules.pop("doubling", None)
        return importlib.import_module("doubling").twice(21.0)

    return run


def test_a_kernel_is_stored_beside_its_module(twice, tmp_path):
    assert twice() == 42
    assert [*tmp_path.rglob("*.nbi")]
    stored = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb?")}
    assert twice() == 42
    assert stored == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb?")}


def test_a_kernel_runs_where_no_folder_can_be_written(twice, monkeypatch, tmp_path):
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    assert twice() == 42
    assert not [*tmp_path.rglob("*.nb?")]
