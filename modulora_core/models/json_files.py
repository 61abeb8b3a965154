"""Read JSON that others wrote, checked by pydantic. A broken file is one line of message."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from modulora_core.errors import CheckpointError, RequestError

T = TypeVar("T")


def read_json(path: Path, kind: type[T], *, error: type[RequestError] = CheckpointError) -> T:
    """Read the file ``path`` as ``kind``, a pydantic model or ``dict[str, Any]``.

    Raises:
        error: names the file, the field, what pydantic expected, and the value.
    """
    return check_json(path.read_bytes(), kind, str(path), error=error)


def check_json(
    data: Any, kind: type[T], subject: str, *, error: type[RequestError] = CheckpointError
) -> T:
    """As :func:`read_json`, for ``bytes`` of JSON or parsed JSON; messages name ``subject``."""
    adapter = TypeAdapter(kind)
    try:
        is_text = isinstance(data, bytes)
        return adapter.validate_json(data) if is_text else adapter.validate_python(data)
    except ValidationError as found:
        first = found.errors(include_url=False)[0]
    expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    field = "".join(f"{part}: " for part in first["loc"])
    ours = first["type"] == "value_error" and not field  # a check of the whole, with its own words
    got = "" if ours else f", got {first['input']!r:.60}"
    raise error(f"{subject}: {field}{expected}{got}; download it again")
