"""What the first CPU kernel changes in its process: the threads of two libraries share it, and so do tiles that come and go."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

KEPT_BYTES = 2**27
"""Free memory at the top of the C library's heap that stays with the process: a tile, what oneDNN makes of it, and activations."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def prepared_numba() -> ModuleType:
    """numba, whose threads have been started, in a process whose heap is kept. Both are done once, before the first kernel."""
    numba = importlib.import_module("numba")
    _start_threads(numba)
    _keep_heap()
    return numba


def _start_threads(numba: ModuleType) -> None:
    """Start numba's threads, once, and take back what its OpenMP layer changes for all of the process when it does so.

    It sets OpenMP's number of threads, torch's too, to that of the cores. And it allows teams of threads inside of teams: where
    ``torch.set_num_threads`` was called, MKL then opens a team for every small product inside of torch's attention, which takes many
    times as long (docs/performance-findings.md, Threads).
    """
    before = torch.get_num_threads()
    numba.get_num_threads()
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
    _keep_teams_flat()


def _keep_teams_flat() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux, where the library has another name too
        return
    # proc(5): the sixth field is the path, which may hold spaces
    libraries = {
        line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "libgomp" in line
    }
    for library in libraries:
        with contextlib.suppress(
            OSError
        ):  # a file that was replaced meanwhile can't be opened by name
            ctypes.CDLL(library).omp_set_max_active_levels(1)


def _keep_heap() -> None:
    """Have the C library keep the memory of tiles, sums and scratch for the next ones.

    By itself glibc gives the top of its heap back to the system where at most 64 MiB are free there, often fewer, and takes larger blocks
    from the system each time (mallopt(3): both thresholds follow what was freed). What comes and goes between two layers would be faulted
    in and zeroed a page at a time, again and again, and a layer's step with 512 rows took up to twice as long
    (docs/performance-findings.md).
    Where the environment sets glibc's thresholds, they stay.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if chosen or os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest that it takes
    libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
