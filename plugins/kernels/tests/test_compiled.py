"""Kernels are found for a device, compiled, cached, and launched on torch's threads."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import modulora_kernels as kernels
import pytest
import torch

numba = pytest.importorskip("numba")

KERNELS = """
from numba import prange
from modulora_kernels import jit

@jit(borrows=True)
def _twice(x, out):
    for k in range(out.size):
        out[k] = 2 * x[k]

@jit(parallel=True)
def double(x, out):
    for piece in prange((out.size + 999) // 1000):
        _twice(x[piece * 1000 : (piece + 1) * 1000], out[piece * 1000 : (piece + 1) * 1000])

@jit()
def double_often(x, out, running):
    running[0] = 1
    for _ in range(1000):
        _twice(x, out)
    running[0] = 0
"""

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder on the path with a module of kernels, as a plugin has one."""
    folder = tmp_path_factory.mktemp("outsider")
    (folder / "outsiders_kernels.py").write_text(KERNELS, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("outsiders_kernels", None)
    kernels.load.cache_clear()


@pytest.fixture(scope="module")
def cpu(folder):
    module = kernels.load("outsiders_kernels", CPU)
    assert module is not None
    return module


def python(code, folder, **environment):
    """Run ``code`` in a process of its own that finds the module of kernels."""
    path = os.pathsep.join([str(folder), str(Path(kernels.__file__).parents[2])])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


DOUBLE = """
    import torch
    import modulora_kernels as kernels
    cpu = kernels.load("outsiders_kernels", torch.device("cpu"))
    x, out = torch.arange(5.0), torch.empty(5)
    kernels.launch(cpu.double, x, out)
    assert out.tolist() == [0, 2, 4, 6, 8], out
"""


@pytest.mark.parametrize("threads", [1, 2, numba.config.NUMBA_NUM_THREADS + 3])
def test_kernels_run_on_as_many_threads_as_torch_and_numba_have(threads):
    before, numbas = torch.get_num_threads(), numba.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(threads)
        kernels.launch(lambda: seen.append(numba.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert seen == [min(threads, numba.config.NUMBA_NUM_THREADS)]
    assert numba.get_num_threads() == numbas


def test_other_python_threads_run_while_a_kernel_does(cpu):
    """If this fails: kernels hold the GIL, and a data loader waits."""
    x, out, running = torch.ones(100_000), torch.empty(100_000), torch.zeros(1)
    flag = running.numpy()  # reading it, unlike a tensor, keeps the GIL
    kernels.launch(cpu.double_often, x, out, running)  # compiled before it counts
    for _ in range(50):  # on a busy machine this thread may sleep through some
        worker = threading.Thread(target=kernels.launch, args=(cpu.double_often, x, out, running))
        worker.start()
        seen = False
        while worker.is_alive() and not seen:
            seen = flag[0] == 1
        worker.join()
        if seen:
            return
    pytest.fail("this thread never ran inside of a kernel")


def test_compiled_kernels_are_cached_for_the_next_process(cpu, folder):
    kernels.launch(cpu.double, torch.ones(3), torch.empty(3))  # compiled here, if nothing has yet
    assert list((folder / "__pycache__").glob("outsiders_kernels.double_*.nbc"))
    hits = """
    assert sum(cpu.double.stats.cache_hits.values()) == 1, cpu.double.stats
    """
    done = python(DOUBLE + hits, folder)
    assert done.returncode == 0, done.stderr


def test_kernels_run_where_no_folder_can_be_written(tmp_path, monkeypatch):
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    (tmp_path / "unstored_kernels.py").write_text(KERNELS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    out = torch.empty(5)
    kernels.launch(importlib.import_module("unstored_kernels").double, torch.arange(5.0), out)
    assert out.tolist() == [0, 2, 4, 6, 8]
    assert not [*tmp_path.rglob("*.nb?")]


def test_the_first_launch_leaves_torchs_threads_and_teams_as_they_were(folder):
    """If this fails: torch takes all cores from then on, or a team inside each team."""
    check = """
    import ctypes
    from pathlib import Path
    assert torch.get_num_threads() == 1, torch.get_num_threads()
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for library in {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}:
        assert ctypes.CDLL(library).omp_get_max_active_levels() == 1, library
    """
    done = python(DOUBLE + check, folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
