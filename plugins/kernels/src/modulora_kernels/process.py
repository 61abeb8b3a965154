"""Prepare a process for kernels: start numba's threads, and keep freed memory on the heap."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from modulora_core.errors import WorkError

HEAP_BYTES = 2**27
"""Free bytes that stay on the C library's heap: a tile, oneDNN's copy of it, and activations."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def prepared_numba() -> ModuleType:
    """Import numba and prepare the process, once, before the first kernel runs.

    Raises:
        WorkError: the process is a fork of a process that has run kernels; OpenMP would end it.
    """
    if _owner() != os.getpid():
        raise WorkError(
            "CPU kernels: expected a process of its own, got a fork of one that has run kernels, "
            "whose threads are not in the fork; start it with multiprocessing's method spawn, as "
            "DataLoader(multiprocessing_context='spawn')"
        )
    return _numba()


@cache
def _owner() -> int:
    return os.getpid()


@cache
def _numba() -> ModuleType:
    numba = importlib.import_module("numba")
    _start_threads(numba)
    _keep_heap()
    return numba


def _start_threads(numba: ModuleType) -> None:
    """Start numba's threads, and undo the changes of its OpenMP layer to the whole process.

    The layer sets OpenMP's number of threads, which torch uses too, to the number of cores. It also
    allows nested teams of threads: MKL then opens a team for each small product of an attention.
    """
    before = torch.get_num_threads()
    numba.get_num_threads()
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
    _keep_teams_flat()


def _keep_teams_flat() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # it loads torch's OpenMP
    with contextlib.suppress(OSError, AttributeError):  # another system, or another OpenMP
        ctypes.CDLL(str(library)).omp_set_max_active_levels(1)


def _keep_heap() -> None:
    """Let glibc keep freed tiles, sums and scratch for the next layer.

    Its own thresholds (mallopt(3)) return them to the system. The next layer would fault them in
    and zero them again, which doubles the time of a layer's step with 512 rows. Thresholds that the
    environment sets stay.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in tunables
    if chosen or os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest value that mallopt takes
    libc.mallopt(_M_TRIM_THRESHOLD, HEAP_BYTES)
