"""A broken cache of compiled kernels costs a warning and a compilation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from modulora_kernels import disk_cache

MODULE = """
from modulora_kernels import jit

@jit()
def twice(x):
    return 2 * x
"""


@pytest.fixture
def twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Import a module with a kernel anew, and run the kernel. Its cache is in ``tmp_path``."""
    pytest.importorskip("numba")
    (tmp_path / "doubling.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(disk_cache, "_warn", disk_cache._warn.__wrapped__)

    def run() -> float:
        sys.modules.pop("doubling", None)
        result: float = importlib.import_module("doubling").twice(21.0)
        return result

    return run


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04"])
def test_a_damaged_file_is_compiled_again(
    twice: Callable[[], float], tmp_path: Path, kind: str, content: bytes
) -> None:
    assert twice() == 42
    (file,) = tmp_path.rglob(f"*.{kind}")
    whole = file.read_bytes()
    file.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="has a damaged file: kernels are compiled again"):
        assert twice() == 42
    assert len(file.read_bytes()) >= len(whole) - 100
    assert twice() == 42  # warnings are errors here


def test_a_cache_that_cannot_be_written_is_no_error(
    twice: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.FunctionCache, "save_overload", full)
    with pytest.warns(RuntimeWarning, match="can't be written .No space left on device"):
        assert twice() == 42
