"""Runs of the kit over the zoo, in a process that has it installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import modulora_conformance

ZOO = Path(__file__).parent / "zoo"
SETTINGS = Path(modulora_conformance.__file__).parent / "pytest.ini"


ENTRY_POINTS = ("modulora_zoo", "zoo_heavy", "zoo_kernels")

SLOW = "SlowMetadata"
"""A process that looks for quantizers where this one is installed computes for 0.6 s first, so it is installed for its own run alone."""


def install(folder: Path, *more: str) -> str:
    """Make the zoo an installed distribution of processes with the PYTHONPATH that this returns; ``more``: modules of entry points."""
    info = folder / "modulora_zoo-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modulora-zoo\nVersion: 1.0\n")
    points = [f"{name} = {name}" for name in (*ENTRY_POINTS, *more)]
    (info / "entry_points.txt").write_text("\n".join(["[modulora]", *points, ""]))
    return os.pathsep.join([str(ZOO), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_all(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """:func:`run` in two processes at a time, of one thread each: most of a run is Python."""
    others = tuple(name for name in names if name != SLOW)
    parts = (others[::2], others[1::2], (SLOW,))
    with ThreadPoolExecutor(2) as pool:
        first, second, slow = pool.map(lambda i: run(folder / str(i), parts[i]), range(3))
    return {**first, **second, **slow}


def run(folder: Path, names: tuple[str, ...], *arguments: str) -> dict[str, dict[str, Any]]:
    """Results by the quantizer's name, of the classes that are named."""
    folder.mkdir(exist_ok=True)
    more = ("zoo_slow",) if SLOW in names else ()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": install(folder / "site", *more),
        "MODULORA_ZOO": ",".join(names),
        "MODULORA_ZOO_RESULTS": str(folder / "results.json"),
    }
    words = [sys.executable, "-m", "pytest", str(ZOO / "check_zoo.py"), "-q", "-p", "no:cacheprovider", "-p", "zoo_results",
             "-c", str(SETTINGS), "--rootdir", str(ZOO), "--hypothesis-seed", "20261125", "--tb=short", "--certified",
             *arguments]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "results.json").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found
