"""Read JSON and YAML that others wrote, checked by pydantic. A broken file is one line of message.

A file may be anything. So it is read up to a limit. Repeated keys and lone surrogates are refused:
other libraries fail on them.
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
        path, kind, error: see above and below.
        advice: ends the message.

    Raises:
        error: the file can't be read or is no JSON; or names the field, what pydantic expected, and
            the value.
    """
    return check_json(read_bytes(path, error), kind, str(path), error=error, advice=advice)


def read_yaml(path: Path, error: type[RequestError]) -> Any:
    """Read a YAML file of at most 64 KiB.

    Raises:
        error: the file can't be read, or is no YAML.
    """
    import yaml

    data = read_bytes(path, error, _MOST_YAML)
    try:
        loader = yaml.SafeLoader(data.decode("utf-8"))
        node = loader.get_single_node()
        _check_keys(node)
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as found:
        raise error(f"{path}: expected YAML, got: {' '.join(str(found).split())}") from None


def _check_keys(root: Any) -> None:
    """Raise ValueError if a key of a YAML mapping comes twice. Each node is visited once."""
    nodes, visited = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in visited or getattr(node, "id", "") not in ("mapping", "sequence"):
            continue
        visited.add(id(node))
        if node.id == "sequence":
            nodes += node.value
            continue
        seen = set[str]()
        for key, value in node.value:
            if key.id == "scalar" and key.value in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"key {key.value!r} twice, again in line {line}")
            seen.add(str(key.value))
            nodes.append(value)


def repair_journal(path: Path, kind: type[T]) -> dict[str, T]:
    """Remove the line that a kill has broken, and all after it, from a file; read the others.

    The work of the removed lines is done again.

    Args:
        path: a file of lines ``[key, value]``; it may be missing.
        kind: the type of a value.

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
    if isinstance(data, bytes):
        try:
            data = parse_json(data.decode("utf-8"))
        except ValueError as found:
            reason = "Invalid JSON: " * isinstance(found, json.JSONDecodeError) + str(found)
            raise error(f"{subject}: {reason}; {advice}") from None
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as found:
        raise error(f"{subject}: {in_one_line(found)}; {advice}") from None


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: no JSON, nested too deeply, a key that comes twice, or a lone surrogate; one
            line.
    """
    try:
        with without_collections():
            value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("expected JSON with fewer levels, got too many") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("expected Unicode text, got a lone surrogate") from None
    return value


@contextmanager
def without_collections() -> Iterator[None]:
    """Pause Python's search for cycles: values of a file have none, and it takes most of the time.

    Reading a header of 99,000 tensors takes a third of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"expected distinct keys, got {twice!r:.80} twice")
    return found
