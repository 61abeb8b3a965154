"""Read JSON and YAML that others wrote, checked by pydantic, with one line for a broken file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from modulora_core.errors import CheckpointError, RequestError
from modulora_core.options import in_one_line

T = TypeVar("T")

MOST_BYTES = 32 * 2**20
"""The largest file: the index of a model with 140,000 tensors has 14 MB."""

DOWNLOAD = "download it again"

_MOST_YAML = 64 * 2**10
"""Bytes. PyYAML reads some 100 kB in a second."""


def read_json(
    path: Path,
    kind: type[T],
    *,
    error: type[RequestError] = CheckpointError,
    advice: str = DOWNLOAD,
) -> T:
    """Read the file ``path`` as ``kind``, a pydantic model or ``dict[str, Any]``.

    Args:
        advice: ends the message.

    Raises error.
    """
    return check_json(read_bytes(path, error), kind, str(path), error=error, advice=advice)


def read_yaml(path: Path, error: type[RequestError]) -> Any:
    """Read a YAML file of at most 64 KiB. Raises ``error``: it can't be read, or is no YAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [str(key.value) for key, _ in node.value]
            for key, _ in node.value:
                if keys.count(str(key.value)) > 1:
                    line = key.start_mark.line + 1
                    raise ValueError(f"key {key.value!r} twice, first in line {line}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(read_bytes(path, error, _MOST_YAML).decode("utf-8"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as found:
        raise error(f"{path}: expected YAML, got: {' '.join(str(found).split())}") from None


def repair_journal(path: Path, kind: type[T]) -> dict[str, T]:
    """Remove the line that a kill has broken, and all after it, from a file; read the others.

    The work of the removed lines is done again.

    Args:
        path: a file of lines ``[key, value]``; it may be missing.

    Returns:
        key → value of the lines that are left.
    """
    if not path.is_file():
        return {}
    entries, whole = [], []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            key, value = check_json(line, tuple, "line")
            entry = str(key), check_json(value, kind, "value")
        except (CheckpointError, ValueError):
            break
        if not line.endswith(b"\n"):
            break
        entries.append(entry)
        whole.append(line)
    path.write_bytes(b"".join(whole))
    return dict(entries)


def read_bytes(
    path: Path, error: type[RequestError], most: int = MOST_BYTES, advice: str = DOWNLOAD
) -> bytes:
    """Read a file of at most ``most`` bytes. Raises ``error``: unreadable, or larger."""
    try:
        with open_file(path, error) as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > most else file.read(size)
    except OSError as found:
        raise _unreadable(path, found, error) from None
    if size > most:
        limit = f"{most // 2**20} MiB" if most >= 2**20 else f"{most // 2**10} KiB"
        raise error(f"{path}: expected at most {limit}, got more; {advice}")
    return data


def open_file(path: Path, error: type[RequestError]) -> BinaryIO:
    """Open a file that exists. Raises ``error``: it can't be read, or is a folder or a pipe."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits for its writer
            raise error(f"{path}: expected a file, got a folder or a device")
        return path.open("rb")
    except (OSError, ValueError) as found:  # ValueError: a name with a null byte
        raise _unreadable(path, found, error) from None


def _unreadable(path: Path, found: Exception, error: type[RequestError]) -> RequestError:
    reason = getattr(found, "strerror", None) or found
    return error(f"{path}: expected a readable file, got: {reason}")


def check_json(
    data: Any,
    kind: type[T],
    subject: str,
    *,
    error: type[RequestError] = CheckpointError,
    advice: str = DOWNLOAD,
) -> T:
    """As :func:`read_json`, for ``bytes`` of JSON or parsed JSON; messages name ``subject``."""
    read = TypeAdapter(kind)
    try:
        return read.validate_json(data) if isinstance(data, bytes) else read.validate_python(data)
    except ValidationError as found:
        raise error(f"{subject}: {in_one_line(found)}; {advice}") from None


def matches(pattern: str, text: str) -> bool:
    """Whether ``pattern`` matches at the beginning of ``text``, as :func:`re.match`.

    Raises ValueError: it is no regular expression.
    """
    try:
        return re.match(pattern, text) is not None
    except (re.error, RecursionError) as error:
        raise ValueError(f"expected a regular expression, got {pattern!r:.80}: {error}") from None
