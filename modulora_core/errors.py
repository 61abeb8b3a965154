"""The exceptions of this package, and errors of the system in their words.

::

    ModuLoRAError
    ├── RequestError               the request was wrong; said before any work     exit code 2
    │   ├── OptionError            an unknown or ill-typed option
    │   ├── PluginError            a quantizer plugin cannot be used
    │   │   ├── UnknownQuantizerError
    │   │   ├── BrokenPluginError
    │   │   ├── IncompatiblePluginError
    │   │   ├── DuplicatePluginError
    │   │   └── BlockedPluginError
    │   ├── ShapeError             a shape that does not fit
    │   ├── ModelError             a model that cannot be found or read
    │   │   └── DenseWeightError   a packed weight used as a tensor
    │   ├── CheckpointError        a shard that is missing, truncated or of other shapes
    │   ├── WeightError            NaN or Inf in a weight
    │   ├── DataError              an empty or malformed data file
    │   ├── AdapterError           an adapter that does not fit its base
    │   ├── OutputError            an output folder that holds something else
    │   ├── DiskSpaceError         too little room for what would be written
    │   └── MissingExtraError      an optional dependency that this request needs
    └── WorkError                  the request was fine and the work failed        exit code 1

A message says the subject, the expected value, the value, and what to do, in one line.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModuLoRAError(Exception):
    """The root of the tree. ``exit_code`` is what the command line ends with."""

    exit_code = 1
    agreed = False
    """Whether all processes of a distributed run know this error."""

    def __init__(self, message: str = "") -> None:
        # a library's text in it may have several lines
        super().__init__(" ".join(map(str.strip, message.splitlines())))

    @property
    def kind(self) -> str:
        """The class's name, as ``--json`` prints it."""
        return type(self).__name__


class RequestError(ModuLoRAError):
    exit_code = 2


class OptionError(RequestError): ...


class PluginError(RequestError): ...


class UnknownQuantizerError(PluginError): ...


class BrokenPluginError(PluginError):
    """The message has the fault, and advice for a user. An author needs the fault alone."""

    def __init__(self, fault: str, advice: str = "") -> None:
        super().__init__("; ".join(filter(None, (fault, advice))))
        self.fault = fault


class IncompatiblePluginError(PluginError): ...


class DuplicatePluginError(PluginError): ...


class BlockedPluginError(PluginError): ...


class ShapeError(RequestError): ...


class ModelError(RequestError): ...


class DenseWeightError(ModelError, AttributeError):
    """``hasattr(weight, "data")`` is False then, and ``weight.data`` says what to do."""


class CheckpointError(RequestError): ...


class WeightError(RequestError): ...


class DataError(RequestError): ...


class AdapterError(RequestError): ...


class OutputError(RequestError): ...


class DiskSpaceError(RequestError): ...


class MissingExtraError(RequestError): ...


class WorkError(ModuLoRAError): ...


_NO_MEMORY = re.compile(
    r"can't start new thread|can(no|')t allocate memory|out of memory|failed to map segment", re.I
)
"""Words of Python, torch and the system's loader of libraries."""


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that this process got no more memory."""
    return error is not None and (
        isinstance(error, MemoryError)
        or _NO_MEMORY.search(str(error)) is not None
        or lacks_memory(error.__cause__ or error.__context__)
    )


def note_plugin(error: BaseException, quantizer: str, work: str) -> None:
    """Add a note to a plugin's exception, which a traceback and the command line show.

    Args:
        error: errors of this package get no note, nor does a lack of memory.
        quantizer: the name of the quantizer that raised it.
        work: the work that failed, with the layer or its shape.
    """
    if not isinstance(error, ModuLoRAError) and not lacks_memory(error):
        error.add_note(
            f"{work}, by {quantizer}; `modulora conformance {quantizer}` finds faults of a plugin"
        )


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

    Raises:
        error: the system can't take it: too long, a null byte, no such user, or no path.
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


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with the next one after a colon; else its type."""
    first, *others = str(error).strip().split("\n", 2)
    if first.endswith(":") and others:
        first = f"{first} {others[0].strip()}"
    return first or type(error).__name__
