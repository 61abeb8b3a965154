"""Read local data files as records. Each record knows its place in the file, for messages."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modulora_core.errors import DataError, MissingExtraError
from modulora_core.files.json_files import parse_json

TEXT_SUFFIXES = (".txt", ".md")
"""Files that are one text, not records."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source: its fields, and its place for messages (``data.jsonl, line 3``)."""

    fields: Mapping[str, Any]
    place: str


def read_text(path: Path) -> str:
    """Read a text with Unix line ends. Raises DataError: unreadable, empty, or not UTF-8."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror}") from error
    if not data.strip():
        raise DataError(f"{path}, line 1: expected text, got an empty file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: expected UTF-8, got byte 0x{data[error.start]:02x} "
            f"({error.reason}); save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: Path) -> list[Record]:
    """Read the records of a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, at least one.

    Raises:
        DataError: the suffix is another one, or the file is malformed; the message names the line.
        MissingExtraError: a parquet file, and pyarrow isn't installed.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join([*TEXT_SUFFIXES, *_READERS])
        got = path.suffix or "no suffix"
        raise DataError(f"{path}: expected a file that ends in one of {known}, got {got!r}")
    records = []
    for fields, place in reader(path):
        if not isinstance(fields, dict):
            raise DataError(f"{path}, {place}: expected a JSON object, got {fields!r:.60}")
        records.append(Record(fields, f"{path}, {place}"))
    if not records:
        raise DataError(f"{path}, line 1: expected one or more records, got none")
    return records


def _jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    # not splitlines(): that also splits at U+2028 and others, which JSON strings may hold
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield parse_json(line), f"line {number}"
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: expected a JSON object, got {error.msg} "
                    f"(column {error.colno})"
                ) from None
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None


def _json(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        values = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        hint = "; one object a line is a .jsonl file" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}: expected JSON, got {error.msg} "
            f"(column {error.colno}){hint}"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}, line 1: expected a list of objects, got {values!r:.60}")
    yield from ((value, f"record {number}") for number, value in enumerate(values, start=1))


def _csv(path: Path) -> Iterator[tuple[Any, str]]:
    rows, line = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), 1
    limit = csv.field_size_limit(2**31 - 1)  # a cell may be longer than the default of 128 KiB
    try:
        header = [name.strip() for name in next(rows)]
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: expected distinct column names, got {header}")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}, line {line}: expected {len(header)} columns ({', '.join(header)}), "
                    f"got {len(row)}"
                )
            if row:
                yield dict(zip(header, row, strict=True)), f"line {line}"
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: expected comma-separated values, got {error}"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            f"{path}: reading parquet needs pyarrow, which is missing; "
            "pip install 'modulora-core[data]'"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: expected a parquet file, got {error}") from error
    yield from ((row, f"row {number}") for number, row in enumerate(rows, start=1))


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[Any, str]]]] = MappingProxyType(
    {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
)
