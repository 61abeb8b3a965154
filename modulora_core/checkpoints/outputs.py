"""Output folders: checked before work, written under a temporary name, renamed when whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from modulora_core.errors import DiskSpaceError, OutputError
from modulora_core.models.unfinished import MARKER, REQUEST

SMALL_FILES = 64 * 2**20
"""Bytes that config, tokenizer and other small files may take."""


def partial_name(out: Path) -> Path:
    """Where ``out`` is written until it is whole: its sibling ``out.partial``."""
    return out.with_name(out.name + ".partial")


def check_output(out: Path, *, resume: bool = False) -> None:
    """Refuse an output path that holds something else.

    Args:
        resume: whether an unfinished run in ``out.partial`` is to be gone on with.

    Raises:
        OutputError: ``out`` exists and isn't an empty folder, its parent can't be written, or ``out.partial`` is in
            the way: it isn't ours, another process writes it, or without ``resume`` it holds a run that can be gone on with.
    """
    if out.is_dir():
        entries = sorted(p.name for p in out.iterdir())
        if entries:
            some = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
            raise OutputError(f"output folder {out}: expected it new or empty, found {len(entries)} entries ({some}); "
                              "choose another name or remove it")  # fmt: skip
    elif out.exists() or out.is_symlink():
        raise OutputError(
            f"output folder {out}: expected a folder or nothing, found a file; choose another name"
        )
    parent = _nearest_folder(out)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output folder {out}: {parent} is not writable; choose another place")
    _check_partial(partial_name(out), resume=resume)


def _check_partial(partial: Path, *, resume: bool) -> None:
    if not partial.exists() or _is_empty(
        partial
    ):  # an empty one may be ours too, killed before it was marked
        return
    if not (partial / MARKER).is_file():
        raise OutputError(f"temporary folder {partial}: expected it free or our own unfinished work, found something else; "
                          "remove or rename it")  # fmt: skip
    with _locked(partial / MARKER):
        pass
    if not resume and (partial / REQUEST).is_file():
        raise OutputError(f"temporary folder {partial}: expected it free, it holds an unfinished run of quantize; go on with it with "
                          "--resume, or remove it, or choose another output folder")  # fmt: skip


def check_disk_space(out: Path, nbytes: int) -> None:
    """Refuse to start what wouldn't fit. Raises DiskSpaceError if ``out``'s disk has less than ``nbytes`` free."""
    folder = _nearest_folder(out)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskSpaceError(f"disk space at {folder}: {nbytes / 2**20:,.0f} MiB would be written, "
                             f"{free / 2**20:,.0f} MiB are free; free some or choose another place")  # fmt: skip


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _nearest_folder(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def whole_or_nothing(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when the block ends well.

    An ``out`` that exists is always whole. After a failure ``out.partial`` stays: with ``resume`` the next call gets it
    as it was. Without, what nobody can go on with is emptied first, and what somebody can (:data:`REQUEST`) is refused.

    Raises:
        OutputError: see :func:`check_output`.
    """
    check_output(out, resume=resume)
    partial = partial_name(out)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial / MARKER):
        if not resume:
            _empty(partial)
        yield partial
        sync_folder(partial)
        if out.exists():
            out.rmdir()  # empty, as checked; os.replace of a folder wants it gone on some systems
        partial.replace(out)
        (
            out / MARKER
        ).unlink()  # only now: a folder without it, killed before its renaming, would be taken for a stranger's
    _sync(out.absolute().parent)


@contextmanager
def _locked(marker: Path) -> Iterator[None]:
    """Hold the lock on an unfinished folder, which ends with the process. Raises OutputError where another one has it."""
    with marker.open("ab") as file:
        if not _lock(file):
            raise OutputError(f"temporary folder {marker.parent}: expected it free, another run is writing it; wait until that has ended, "
                              "or choose another output folder")  # fmt: skip
        yield


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder that is written in its place. Raises OutputError where another process has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and has no locks of this kind
        yield
        return
    try:
        if not _lock(descriptor):
            raise OutputError(f"output folder {folder}: expected it free, another run is writing it; wait until that has ended, or "
                              "choose another output folder")  # fmt: skip
        yield
    finally:
        os.close(descriptor)


def _lock(file: IO[bytes] | int) -> bool:
    """False where somebody else has the lock; True where it is had, or there are none on this system."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _empty(partial: Path) -> None:
    """Remove all but the marker: with it the lock would go."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def write_file(path: Path, data: str | bytes) -> None:
    """Write one file so that ``path`` is, at any moment, absent, the old one or the whole new one."""
    partial = partial_name(path)
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    _sync(partial)
    partial.replace(path)
    _sync(path.absolute().parent)


def sync_folder(folder: Path) -> None:
    """Fsync every file below ``folder`` and the folder itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
