"""Local data files as records, each of which knows the line that it came from."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modulora_core.errors import DataError, MissingExtraError

TEXT_SUFFIXES = (".txt", ".md")
"""Files that are one text, not records."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source: its fields, and where it is (``data.jsonl, line 3``) for messages."""

    fields: Mapping[str, Any]
    place: str


def read_text(path: Path) -> str:
    """The file's text, with Unix line ends. Raises DataError: unreadable, empty, or not UTF-8."""
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
            f"{path}, line {line}: expected UTF-8, got byte 0x{data[error.start]:02x} ({error.reason}); "
            "save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: Path) -> list[Record]:
    """The records of a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, at least one.

    Raises:
        DataError: the suffix is another one, or the file is malformed; the message names the line.
        MissingExtraError: a parquet file, and pyarrow isn't installed.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join([*TEXT_SUFFIXES, *_READERS])
        raise DataError(
            f"{path}: expected a file that ends in one of {known}, got {path.suffix or 'no suffix'!r}"
        )
    records = reader(path)
    if not records:
        raise DataError(f"{path}, line 1: expected one or more records, got none")
    return records


def _jsonl(path: Path) -> list[Record]:
    records = []
    # not splitlines(): that also splits at U+2028 and others, which JSON strings may hold
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: expected a JSON object, got {error.msg} (column {error.colno})"
                ) from None
            records.append(_record(value, place))
    return records


def _json(path: Path) -> list[Record]:
    text = read_text(path)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line is a .jsonl file" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}: expected JSON, got {error.msg} (column {error.colno}){hint}"
        ) from None
    if not isinstance(whole, list):
        raise DataError(f"{path}, line 1: expected a list of objects, got {_json_type(whole)}")
    return [_record(value, f"{path}, line {line}") for value, line in _with_lines(text)]


def _with_lines(text: str) -> Iterator[tuple[Any, int]]:
    """The values of a JSON list that is known to be valid, and the line on which each starts."""
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        while text[position].isspace() or text[position] == ",":
            position += 1
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield value, line


def _csv(path: Path) -> list[Record]:
    records: list[Record] = []
    with _no_field_limit():
        rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        line = 1
        try:
            header = [name.strip() for name in next(rows)]
            if len(set(header)) < len(header):
                raise DataError(
                    f"{path}, line 1: expected a header of distinct column names, got {header}"
                )
            line = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(header):
                    columns = f"{len(header)} columns ({', '.join(header)})"
                    raise DataError(f"{path}, line {line}: expected {columns}, got {len(row)}")
                if row:
                    records.append(
                        Record(dict(zip(header, row, strict=True)), f"{path}, line {line}")
                    )
                line = rows.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: expected comma-separated values, got {error}"
            ) from None
    return records


@contextmanager
def _no_field_limit() -> Iterator[None]:
    # the csv module refuses cells over 128 KiB unless told; a document in a cell may well be longer
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> list[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            f"{path}: reading parquet needs pyarrow, which is missing; pip install 'modulora-core[data]'"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: expected a parquet file, got {error}") from error
    return [Record(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


_READERS: Mapping[str, Callable[[Path], list[Record]]] = MappingProxyType(
    {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
)


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, got {_json_type(value)}")
    return Record(value, place)


def _json_type(value: Any) -> str:
    """JSON's own name for the type of a value, with its article."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]
