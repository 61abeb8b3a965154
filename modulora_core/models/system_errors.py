"""Errors of the system, such as a full disk, in the words of this package."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modulora_core.errors import OutputError, RequestError

_RUST = re.compile(r"\(os error (\d{1,5})\)")
_TORCH = re.compile(r"inline_container|iostream error")
"""Words of torch.save, whose errors have no number."""

_FULL = {
    errno.ENOSPC: "free some room, or choose another place",
    errno.EDQUOT: "free some room, or choose another place",
    errno.EFBIG: "raise the limit of the size of a file (ulimit -f), or write smaller files",
    errno.EROFS: "choose another place",
}


def usable_path(path: str | Path, subject: str, error: type[RequestError]) -> Path:
    """Turn a user's words into a path, with ``~`` for the home folder.

    Raises error: the system can't take it: too long, a null byte, no such user, or no path.
    """
    try:
        found = Path(path).expanduser()
        str(found).encode()
        found.stat()
    except UnicodeEncodeError:  # the readers of weights and tokenizers open no other names
        raise error(f"{subject} {str(path)!r:.80}: expected a name in UTF-8; rename it") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError, RuntimeError, TypeError) as refused:
        reason = getattr(refused, "strerror", None) or refused
        raise error(f"{subject} {str(path)!r:.80}: expected a usable path: {reason}") from None
    return found


def said_by_system(error: OSError) -> str | None:
    """The system's reason with the file, in one line; None if another library raised it."""
    if error.errno is None or error.strerror is None:
        return None
    place = "" if error.filename is None else f"{error.filename!s:.200}: "
    return f"{place}{error.strerror}"


def as_output_error(error: Exception, place: Path) -> OutputError | None:
    """The error of a full disk, a limit or a place that can't be written; None for others.

    Args:
        error: of Python, or of a library in Rust, whose message has the system's number.
        place: for the message, if the error names no file.
    """
    if _TORCH.search(str(error)):
        return OutputError(f"{place!s:.200}: can't be written whole; {_FULL[errno.ENOSPC]}")
    number = error.errno if isinstance(error, OSError) else None
    if found := _RUST.search(str(error)):
        number = int(found[1])
    if number not in _FULL:
        return None
    # a copy has two names: of the file that was read, and of the one that could not be written
    place = getattr(error, "filename2", None) or getattr(error, "filename", None) or place
    return OutputError(f"{place!s:.200}: {os.strerror(number)}; {_FULL[number]}")


@contextmanager
def full_disk_named(place: Path) -> Iterator[None]:
    """Say what to do if the system has no room for a file in ``place``. Raises OutputError."""
    try:
        yield
    except Exception as error:
        named = as_output_error(error, place)
        if named is None:
            raise
        raise named from error
