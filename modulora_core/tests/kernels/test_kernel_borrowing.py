"""Kernels that make no arrays count no references to those that they are given."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from modulora_core import kernels

numba = pytest.importorskip("numba")

BORROWING = """
import numpy as np
from modulora_core.kernels import jit

@jit(borrows=True)
def _double(x, out):
    for k in range(out.size):
        out[k] = 2 * x[k]

def double(x, out):
    for r in range(len(out)):
        _double(x[r], out[r])

def make(x, out):
    out[:] = np.empty(out.size, out.dtype)
"""


def test_what_borrows_counts_no_references_and_makes_no_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails: numba has another name now for the option that ``jit`` sets. In a new folder nothing is compiled yet."""
    (tmp_path / "borrowing_kernels.py").write_text(BORROWING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("borrowing_kernels")
    x, out = np.arange(4.0).reshape(2, 2), np.zeros((2, 2))

    def code(borrows: bool) -> str:
        kernel = kernels.jit(borrows=borrows)(module.double)
        kernel(x, out)
        return str(next(iter(kernel.inspect_llvm().values())))

    assert "NRT_incref" in code(borrows=False)
    assert "NRT_incref" not in code(borrows=True)
    assert out.tolist() == [[0, 2], [4, 6]]
    with pytest.raises(numba.core.errors.NumbaError):
        kernels.jit(borrows=True)(module.make)(x, out)
