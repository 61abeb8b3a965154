"""Read JSON that others wrote, checked by pydantic. A broken file is one line of message.

A file may be anything. So it is read up to a limit. Deep nesting, repeated keys, long integers and
lone surrogates are refused: other libraries fail on them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from modulora_core.errors import CheckpointError, RequestError

T = TypeVar("T")

MOST_BYTES = 32 * 2**20
"""The largest file: the index of a model with 140,000 tensors has 14 MB."""

MOST_VALUES = 2_000_000
DEEPEST = 64
"""Levels of objects and lists. Recursive code of other libraries takes hundreds."""

_MOST_DIGITS = 400
"""Digits of an integer. The largest float64 has 309."""


def read_json(path: Path, kind: type[T], *, error: type[RequestError] = CheckpointError) -> T:
    """Read the file ``path`` as ``kind``, a pydantic model or ``dict[str, Any]``.

    Raises:
        error: the file can't be read or is no JSON; or names the field, what pydantic expected, and
            the value.
    """
    return check_json(read_bytes(path, error), kind, str(path), error=error)


def read_bytes(path: Path, error: type[RequestError], most: int = MOST_BYTES) -> bytes:
    """Read a file of at most ``most`` bytes. Raises ``error``: unreadable, or larger."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits for its writer
            raise error(f"{path}: expected a file, got a folder or a device")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as found:  # ValueError: a name with a null byte
        reason = getattr(found, "strerror", None) or found
        raise error(f"{path}: expected a readable file, got: {reason}") from None
    if len(data) > most:
        raise error(f"{path}: expected at most {most // 2**20} MiB, got more; download it again")
    return data


def check_json(
    data: Any, kind: type[T], subject: str, *, error: type[RequestError] = CheckpointError
) -> T:
    """As :func:`read_json`, for ``bytes`` of JSON or parsed JSON; messages name ``subject``."""
    if isinstance(data, bytes):
        if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
            raise error(f"{subject}: expected at most {MOST_VALUES:,} values, got more")
        try:
            data = parse_json(data.decode("utf-8"))
        except ValueError as found:
            reason = "Invalid JSON: " * isinstance(found, json.JSONDecodeError) + str(found)
            raise error(f"{subject}: {reason}; download it again") from None
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as found:
        first = found.errors(include_url=False)[0]
    expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    field = "".join(f"{part}: " for part in first["loc"])
    ours = first["type"] == "value_error" and not field  # a check of the whole, with its own words
    got = "" if ours else f", got {first['input']!r:.60}"
    raise error(f"{subject}: {field}{expected}{got}; download it again")


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: no JSON, nested too deeply, a key that comes twice, an integer of many digits,
            or a lone surrogate; one line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_int=_integer)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"expected at most {DEEPEST} levels, got more") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("expected Unicode text, got a lone surrogate") from None
    return value


def _check_depth(value: Any) -> None:
    """Raises RecursionError: it has more than :data:`DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise RecursionError


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"expected distinct keys, got {twice!r:.80} twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"expected at most {_MOST_DIGITS} digits, got {len(digits)}")
    return int(digits)
