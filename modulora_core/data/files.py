"""Read local data files as records. Each record knows its place in the file, for messages."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modulora_core.data.parquet import parquet_rows
from modulora_core.errors import DataError
from modulora_core.models.json_files import open_file, parse_json, read_bytes, without_collections

TEXT_SUFFIXES = (".txt", ".md")
"""Files that are one text, not records."""

MOST_BYTES = 2**30
"""The largest file, except for ``.jsonl``, which is read line by line."""

MOST_LINE = 32 * 2**20
_MOST_COLUMNS = 1000
_PARQUET = ".parquet"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source: its fields, and its place for messages (``data.jsonl, line 3``)."""

    fields: Mapping[str, Any]
    place: str


Check = Callable[[Sequence[Record]], object]
"""``check(records)`` raises DataError for records of other fields."""


def read_text(path: Path) -> str:
    """Read a text of at most 1 GiB with Unix line ends.

    Raises:
        DataError: unreadable, larger, empty, or not UTF-8.
    """
    data = read_bytes(path, DataError, MOST_BYTES, "cut it into several files")
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        raise DataError(f"{path}, line 1: expected text, got an empty file")
    return _decode(data, path, 1).replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: expected UTF-8, got byte 0x{data[error.start]:02x} "
            f"({error.reason}); save the file as UTF-8"
        ) from None


def check_suffix(path: Path) -> None:
    """Raise DataError if the suffix of a file is none that can be read."""
    known = [*TEXT_SUFFIXES, *_READERS, _PARQUET]
    if path.suffix.lower() not in known:
        raise DataError(
            f"{path}: expected a file that ends in one of {', '.join(known)}, got "
            f"{path.suffix or 'no suffix'!r}"
        )


@without_collections()
def read_records(
    path: Path, check: Check | None = None, columns: Collection[str] = ()
) -> list[Record]:
    """Read the records of a file, at least one: jsonl, json, csv, tsv or parquet.

    Args:
        path: the file.
        check: called with the first record, so that a large file of others is refused at once.
        columns: the columns of a parquet file to read; all if it has none of them, or none is
            named.

    Raises:
        DataError: the file is malformed; the message names the line.
        MissingExtraError: a parquet file, and pyarrow isn't installed.
    """
    suffix = path.suffix.lower()
    if suffix == _PARQUET:
        rows = parquet_rows(path, columns, MOST_LINE, MOST_BYTES)
    else:
        rows = _READERS[suffix](path)
    records = []
    for fields, place in rows:
        if not isinstance(fields, dict) or not fields:
            raise DataError(f"{path}, {place}: expected an object with fields, got {fields!r:.60}")
        records.append(Record(fields, f"{path}, {place}"))
        if check is not None and len(records) == 1:
            check(records)
    if not records:
        raise DataError(f"{path}, line 1: expected one or more records, got none")
    return records


def _jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    # not str.splitlines(): it also splits at U+2028 and others, which JSON strings may hold
    for number, data in enumerate(_lines(path), start=1):
        line = _decode(data, path, number).strip()
        if line:
            try:
                yield parse_json(line), f"line {number}"
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: expected a JSON object, got a syntax error in "
                    f"column {error.colno} ({error.msg})"
                ) from None
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file of any size. Raises DataError: a line has more than 32 MiB."""
    with open_file(path, DataError) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), start=1):
            if len(line) > MOST_LINE:
                raise DataError(
                    f"{path}, line {number}: expected at most {MOST_LINE // 2**20} MiB, got more"
                )
            yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        values = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        hint = "; one object a line is a .jsonl file" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}: expected JSON, got a syntax error in column "
            f"{error.colno} ({error.msg}){hint}"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}, line 1: expected a list of objects, got {values!r:.60}")
    yield from ((value, f"record {number}") for number, value in enumerate(values, start=1))


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[Any, str]]:
    text = io.StringIO(read_text(path), newline="")
    rows, line = csv.reader(text, delimiter=delimiter, strict=True), 1
    limit = csv.field_size_limit(2**31 - 1)  # a cell may be longer than the default of 128 KiB
    try:
        header = [name.strip() for name in next(rows)]
        if not any(header):
            raise DataError(f"{path}, line 1: expected column names, got a blank line; remove it")
        if not len(set(header)) == len(header) <= _MOST_COLUMNS:
            raise DataError(
                f"{path}, line 1: expected distinct column names, at most {_MOST_COLUMNS}, got "
                f"{len(header)}: {header!r:.200}"
            )
        names, line = ", ".join(header), rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}, line {line}: expected {len(header)} columns ({names:.200}), "
                    f"got {len(row)}"
                )
            if row:
                yield dict(zip(header, row, strict=True)), f"line {line}"
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: expected values separated by {delimiter!r}, with quotes doubled "
            f"inside of quotes, got {error}"
        ) from None
    finally:
        csv.field_size_limit(limit)


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[Any, str]]]] = MappingProxyType(
    {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": functools.partial(_csv, delimiter="\t"),
    }
)
