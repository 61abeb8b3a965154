"""Records the lines and branches that run: coverage.py, in this process and in those it starts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coverage import Coverage, CoverageData

Branch = tuple[int, int]
"""The line of a condition, and the line that follows; below 0 where the function ends."""


def coverage_of(files: Sequence[str]) -> Coverage:
    """A recorder of these files, which writes nothing, and which no comment in a file stops."""
    found = Coverage(data_file=None, branch=True, config_file=False, include=list(files))
    found.set_option("run:disable_warnings", ["no-data-collected", "module-not-measured"])
    for option in ("exclude_lines", "partial_branches"):
        found.set_option(f"report:{option}", [])
    return found


@contextmanager
def recording(recorder: Coverage | None) -> Iterator[None]:
    if recorder is None:
        yield
        return
    recorder.start()
    try:
        yield
    finally:
        recorder.stop()


def files_recorded() -> list[str]:
    """The files that a recorder of this module records now; another process may record them too."""
    current = Coverage.current()
    found = current.get_option("run:include") if current is not None else None
    return found if isinstance(found, list) else []


def add(dumped: bytes) -> None:
    """Add what another process recorded."""
    current = Coverage.current()
    if current is not None:
        merge(current, dumped)


def merge(recorder: Coverage, dumped: bytes) -> None:
    if not dumped:
        return
    data = CoverageData(no_disk=True)
    data.loads(dumped)
    recorder.get_data().update(data)


@dataclass
class Ran:
    """Lines and branches of a file, as coverage.py's JSON has them: run or not."""

    lines: set[int] = field(default_factory=set)
    missing_lines: set[int] = field(default_factory=set)
    branches: set[Branch] = field(default_factory=set)
    missing_branches: set[Branch] = field(default_factory=set)
    parts: set[int] = field(default_factory=set)
    """All lines that ran: the others begin statements."""


def ran(recorder: Coverage, files: Iterable[Path]) -> dict[Path, Ran]:
    """What ran of each file."""
    files, found = list(files), {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        recorder.json_report(morfs=[str(file) for file in files], outfile=str(report))
        read: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["files"]
    for name, each in read.items():
        path = Path(name).resolve()
        found[path] = Ran(
            set(each["executed_lines"]),
            set(each["missing_lines"]),
            {(a, b) for a, b in each.get("executed_branches", ())},
            {(a, b) for a, b in each.get("missing_branches", ())},
            set(recorder.get_data().lines(str(path)) or ()),
        )
    return {file: found[file.resolve()] for file in files}
