"""Processes that are forked from one that is ready behave as those that are started from scratch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from modulora_conformance import fresh_process
from modulora_conformance.fresh_process import run_python

CASES = {
    "a module with arguments": ("-m", "told", "a b", "--c"),
    "code that reads its argv and path": (
        "-c",
        "import sys, told; print(sys.argv, sys.path[0] == '')",
    ),
    "an exit code": ("-c", "raise SystemExit(3)"),
    "a message": ("-c", "import sys; sys.exit('no')"),
    "an error": ("-c", "import os; os.write(1, b'before'); print('this'); 1 / 0"),
    "a signal": ("-c", "import os; os.kill(os.getpid(), 11)"),
    "no input": ("-c", "import sys; print(repr(sys.stdin.read()))"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "told.py").write_text(
        "import sys, os\nprint(sys.argv[1:], __name__, os.getcwd())\n"
    )
    return tmp_path


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_a_run_ends_as_in_an_interpreter_from_scratch(words: tuple[str, ...], folder: Path) -> None:
    """``ready=()`` here and below: what is imported before plays no part."""
    ours = run_python(*words, cwd=folder, ready=())
    theirs = subprocess.run([sys.executable, *words], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.strip().splitlines()[-1:] == theirs.stderr.strip().splitlines()[-1:]


def test_runs_share_nothing_with_each_other_nor_with_this_process(folder: Path) -> None:
    marks = "import builtins, os; print(os.getpid(), hasattr(builtins, 'mark')); builtins.mark = 1"
    exec(marks.partition(";")[0])
    runs = [run_python("-c", marks, cwd=folder, ready=()).stdout.split() for _ in range(2)]
    assert [word for _, word in runs] == ["False", "False"]
    assert len({runs[0][0], runs[1][0], str(os.getpid())}) == 3


def test_a_run_has_the_environment_that_it_is_given(folder: Path) -> None:
    code = "import os; print(os.environ.get('MODULORA_TEST'))"
    for value in ("1", "2"):
        done = run_python(
            "-c", code, cwd=folder, env={**os.environ, "MODULORA_TEST": value}, ready=()
        )
        assert done.stdout.strip() == value
    assert len(fresh_process._nurseries) <= fresh_process.MOST


def test_a_run_that_takes_too_long_is_ended_and_the_next_one_works(folder: Path) -> None:
    pid = "import os, time, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", pid, cwd=folder, timeout=3, ready=())
    if sys.platform == "linux":
        state = Path("/proc") / (folder / "pid").read_text() / "stat"
        wait_until(
            lambda: has_ended(state)
        )  # killed it is, but the kernel takes its memory down first
    assert run_python("-c", "print(7)", cwd=folder, ready=()).stdout == "7\n"


def has_ended(state: Path) -> bool:
    try:
        return state.read_text().split()[2] == "Z"
    except OSError:
        return True


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """For less time than the process would have slept."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_nursery_that_has_ended_is_replaced(folder: Path) -> None:
    run_python("-c", "pass", cwd=folder, ready=())
    for nursery in fresh_process._nurseries.values():
        nursery._process.kill()
        nursery._process.wait()
    assert run_python("-c", "print(7)", cwd=folder, ready=()).stdout == "7\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no nursery")
def test_what_is_ready_was_imported_once(folder: Path) -> None:
    code = "import sys; print('modulora_core.registry' in sys.modules, 'numba' in sys.modules)"
    assert (
        run_python("-c", code, cwd=folder, ready=("modulora_core.registry",)).stdout
        == "True False\n"
    )
