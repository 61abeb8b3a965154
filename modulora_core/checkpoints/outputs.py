"""Make output folders appear whole: checked before work, renamed at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from modulora_core.errors import CheckpointError, DiskSpaceError, OutputError
from modulora_core.models.folders import MARKER, REQUEST
from modulora_core.models.json_files import read_bytes
from modulora_core.models.system_errors import full_disk_named, usable_path
from modulora_core.progress import Progress, no_progress

DIGESTS = "SHA256SUMS"
"""The file of digests: ``sha256sum --check SHA256SUMS`` verifies a folder too."""

SMALL_FILES = 64 * 2**20
"""The bytes to reserve for config, tokenizer and other small files."""


def partial_name(out: Path) -> Path:
    """The sibling ``out.partial``, in which ``out`` is written until it is whole."""
    if not out.name:
        raise OutputError(f"output {out}: expected the name of a new place, got none; add a name")
    return out.with_name(out.name + ".partial")


def check_output(out: Path, *, resume: bool = False) -> None:
    """Refuse an output path that holds something else; ``resume`` allows an unfinished run.

    Raises OutputError.
    """
    usable_path(partial_name(out), "output folder", OutputError)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        got = "link; give the folder itself" if out.is_symlink() else "file; choose another name"
        raise OutputError(f"output folder {out}: expected a folder or nothing, found a {got}")
    if out.is_dir():
        entries = sorted(path.name for path in out.iterdir())
        if entries:
            some = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
            raise OutputError(
                f"output folder {out}: expected it new or empty, found {len(entries)} entries "
                f"({some}); choose another name or remove it"
            )
    parent = _nearest_folder(out)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output folder {out}: {parent} is not writable; choose another place")
    _check_partial(partial_name(out), resume=resume)


def _check_partial(partial: Path, *, resume: bool) -> None:
    # an empty folder may be ours: killed before it was marked
    if not partial.exists() or (partial.is_dir() and not any(partial.iterdir())):
        return
    subject = f"temporary folder {partial}: expected it free"
    if not (partial / MARKER).is_file():
        raise OutputError(
            f"{subject} or our own unfinished work, found something else; remove or rename it"
        )
    with _lock(partial / MARKER, subject):
        pass
    if not resume and (partial / REQUEST).is_file():
        raise OutputError(
            f"{subject}, it holds an unfinished run of quantize; go on with it with --resume, or "
            "remove it, or choose another output folder"
        )


def check_disk_space(out: Path, nbytes: int) -> None:
    """Refuse to start without ``nbytes`` free on the disk of ``out``. Raises DiskSpaceError."""
    folder = _nearest_folder(out)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskSpaceError(
            f"disk space at {folder}: {nbytes / 2**20:,.0f} MiB would be written, "
            f"{free / 2**20:,.0f} MiB are free; free some or choose another place"
        )


def _nearest_folder(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


@contextmanager
def whole_or_nothing(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """Give a folder to write into; it becomes ``out`` when the block ends well.

    An ``out`` that exists is always whole. After a failure ``out.partial`` is removed, unless it
    holds a :data:`REQUEST`: then it stays for a call with ``resume``, and others are refused. A
    process that was killed leaves it too, and the next call empties it.

    Raises OutputError: see :func:`check_output`.
    """
    check_output(out, resume=resume)
    partial = partial_name(out)
    partial.mkdir(parents=True, exist_ok=True)
    with _lock(partial / MARKER, f"temporary folder {partial}: expected it free"):
        if not resume:
            _empty(partial)
        try:
            with full_disk_named(out), _named_if_gone(partial, "temporary folder"):
                yield partial
                sync_folder(partial)
        except BaseException:
            if not (partial / REQUEST).is_file():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if out.exists():
            out.rmdir()  # empty, as checked; some systems don't replace a folder
        with _named_if_gone(partial, "temporary folder"):
            partial.replace(out)
        # last, since a run killed before its renaming is known by the marker
        (out / MARKER).unlink()
    _sync(out.absolute().parent)


@contextmanager
def _named_if_gone(folder: Path, subject: str) -> Iterator[None]:
    """Name the cause if work in a folder fails after somebody removed it. Raises OutputError."""
    try:
        yield
    except Exception as error:
        if folder.is_dir():
            raise
        raise OutputError(
            f"{subject} {folder}: somebody removed it while it was written; run the command again"
        ) from error


def check_new_file(out: Path, suffix: str) -> None:
    """Raise OutputError if a new file's path exists, has another suffix, or lacks its folder."""
    usable_path(partial_name(out), "output file", OutputError)
    if out.suffix.lower() != suffix or out.exists() or not out.parent.is_dir():
        got = "a file that exists" if out.exists() else "no such folder"
        if out.suffix.lower() != suffix:
            got = f"the suffix {out.suffix!r}"
        raise OutputError(
            f"{out}: expected a new file called *{suffix} in a folder that exists, got {got}"
        )
    if partial_name(out).is_dir():
        raise OutputError(f"temporary file {partial_name(out)}: expected it free, found a folder")


@contextmanager
def new_file(out: Path, suffix: str) -> Iterator[Path]:
    """Give a path to write; it becomes the file ``out`` when the block ends well.

    Raises OutputError: as :func:`check_new_file`, or another process writes it.
    """
    check_new_file(out, suffix)
    partial = partial_name(out)
    with _lock(partial, f"temporary file {partial}: expected it free"):
        try:
            check_new_file(out, suffix)  # another run may have written it before we had the lock
            with full_disk_named(out):
                yield partial
                _sync(partial)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    _sync(out.absolute().parent)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder, and hold the lock on it; remove it at the end if it is still empty.

    Raises OutputError: another process has the lock.
    """
    usable_path(folder, "output folder", OutputError)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, f"output folder {folder}: expected it free"), full_disk_named(folder):
        try:
            with _named_if_gone(folder, "output folder"):
                yield
        finally:
            with suppress(OSError):  # it has files
                folder.rmdir()


@contextmanager
def _lock(path: Path, subject: str) -> Iterator[None]:
    """Hold the lock on a folder, or on a file, which is made. It ends with the process.

    Raises OutputError: another process holds it; the message begins with ``subject``.
    """
    try:
        import fcntl

        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags, 0o666)
    except (ImportError, OSError):  # Windows opens no folders, and has no such locks
        if not path.is_dir():
            path.touch()
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{subject}, another run is writing it; wait until that has ended, or choose "
                "another output folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _empty(partial: Path) -> None:
    """Remove all but the marker, which has the lock."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def write_file(path: Path, data: str | bytes) -> None:
    """Write one file: ``path`` is at any moment absent, the old file, or the whole new one."""
    partial = partial_name(path)
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    _sync(partial)
    partial.replace(path)
    _sync(path.absolute().parent)


def sync_folder(folder: Path) -> None:
    """Write every file below ``folder``, and the folder itself, to the disk (fsync)."""
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


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of each file below a folder, as ``sha256sum`` does."""
    digests = digests_of(folder, without=(MARKER, DIGESTS))
    write_file(folder / DIGESTS, "".join(f"{found}  {name}\n" for name, found in digests.items()))


def digests_of(folder: Path, without: Collection[str] = ()) -> dict[str, str]:
    """The SHA-256 of each file below ``folder`` by its relative name, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = ((path.relative_to(folder).as_posix(), path) for path in files)
    return {name: digest(path) for name, path in names if name not in without}


def check_digests(folder: Path, suffix: str = "", progress: Progress = no_progress) -> int:
    """Compare each file of a folder with its recorded SHA-256, and return the number of files.

    Args:
        suffix: only files whose name ends with it.

    Raises CheckpointError.
    """
    listed = folder / DIGESTS
    if not listed.is_file():
        raise CheckpointError(
            f"{listed}: expected the digests of the folder's files, found none; quantize, convert "
            "and merge write them"
        )
    text = read_bytes(listed, CheckpointError).decode("utf-8", "replace")
    lines = [line.partition("  ") for line in text.splitlines() if line.endswith(suffix)]
    names = {name for _, _, name in lines}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in names:
            raise CheckpointError(f"{listed}: expected a digest of {path.name}, found none")
    for done, (expected, _, name) in enumerate(lines):
        progress("checking", done, len(lines))
        if not _is_inside(name):
            raise CheckpointError(f"{listed}: expected names in the folder, got {name!r:.60}")
        path = folder / name
        got = digest(path) if path.is_file() else "no file"
        if got != expected:
            raise CheckpointError(
                f"{path}: expected the SHA-256 {expected[:12]}…, got {got[:12]}; download it again"
            )
    return len(lines)


def _is_inside(name: str) -> bool:
    path = PurePath(name)
    return not path.anchor and ".." not in path.parts and "\0" not in name


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
