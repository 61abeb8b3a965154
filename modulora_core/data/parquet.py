"""Read parquet files, decoded in a process with a limit of memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modulora_core.data.tables import table_row
from modulora_core.errors import DataError, MissingExtraError
from modulora_core.models.workers import ask, worker

MEMORY = 2**30
"""The bytes that decoding may take."""

_ROWS = 64
"""Rows that are decoded at once."""

_SCRIPT = Path(__file__).with_name("parquet_worker.py")


def parquet_rows(
    path: Path, columns: Collection[str], most_rows: int, most: int
) -> Iterator[tuple[Any, str]]:
    """The rows of a file, each with its place.

    Args:
        path: the file.
        columns: other columns are skipped, unless the file has none of these.
        most_rows: the limit of 64 rows, in bytes.
        most: the limit of all rows, in bytes.

    Raises:
        DataError: it is malformed, or its values take more.
        MissingExtraError: pyarrow isn't installed.
    """
    if find_spec("pyarrow") is None:
        raise MissingExtraError(
            f"{path}: reading parquet needs pyarrow, which is missing; "
            "pip install 'modulora-core[data]'"
        )
    from pyarrow import ipc

    request = {"path": str(path), "columns": [*columns], "rows": _ROWS, "most_rows": most_rows,
               "most": most}  # fmt: skip
    number = 0
    with worker(_SCRIPT, str(MEMORY)) as process:
        ask(process, json.dumps(request).encode("ascii"))
        assert process.stdout is not None
        while size := int.from_bytes(process.stdout.read(8), "little"):
            if len(message := process.stdout.read(size)) < size:
                break
            try:
                rows = ipc.open_stream(message).read_all().to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: expected text in UTF-8, got {error}") from None
            for row in rows:
                number += 1
                yield table_row(row), f"row {number}"
        end = process.stdout.readline()
        if not end:  # the kernel ended it, or it ended itself
            raise _too_much(path, f"{MEMORY // 2**20} MiB of memory to decode it")
    found = json.loads(end)
    if "most" in found:
        raise _too_much(path, found["most"])
    if "error" in found:
        raise DataError(f"{path}: expected a parquet file, got {found['error']}")


def _too_much(path: Path, most: str) -> DataError:
    return DataError(f"{path}: expected at most {most}, got more; cut it into several files")
