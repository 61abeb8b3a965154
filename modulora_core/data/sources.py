"""Read a SOURCE as records: files, a Hub dataset or ``pydoc``, or a slice of one.

::

    notes.txt  data.jsonl  data.json  data.csv  data.tsv  data.parquet    a file
    org/name   org/name:split   org/name:config:split             a Hub dataset, or such a folder
    folder     folder:split                                       of Dataset.save_to_disk
    pydoc                                                         English text of CPython
    anything[:90%]   anything[10%:20%]                            a part of it

In Python a source may also be records: a ``datasets.Dataset``, a table of pandas, polars or
pyarrow, or any sequence of dicts.

A slice counts in whole percent, rounded to the nearest record as in Hugging Face datasets. A text
is cut between paragraphs. Slices that meet at a percentage share no record and leave none out.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modulora_core.data.files import (
    TEXT_SUFFIXES,
    Check,
    Record,
    check_suffix,
    read_records,
    read_text,
)
from modulora_core.data.tables import dataset_rows, table_rows
from modulora_core.errors import DataError, MissingExtraError

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[str, Any]]
"""One source or several, which are read one after the other; or records, as dicts."""

_SLICED = re.compile(r"(.+)\[([^\[\]]*)\]", re.DOTALL)
_PERCENTS = re.compile(r"\s*(?:(\d{1,3})%)?\s*:\s*(?:(\d{1,3})%)?\s*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:/]+){0,2}")
_LIKE_A_FILE = re.compile(
    r"[./~].*|.*/.*/.*|.*\\.*|.*\.(txt|md|jsonl|json|csv|tsv|parquet|gz|zip|xz|arrow)",
    re.IGNORECASE | re.DOTALL,
)

_SAVED_ALONE = "state.json"
_SAVED = (_SAVED_ALONE, "dataset_dict.json")
"""Files of a folder that the library datasets saved: a dataset alone, or several splits."""

# places to cut a text, from the best to the worst: after a blank line, a line, a word, anywhere
_CUTS = (
    re.compile(r"\n(?:[ \t]*\n)+"),
    re.compile(r"\n+"),
    re.compile(r"\s+"),
    re.compile(r"(?s)."),
)

_SMALL = 2**24
"""Bytes that are read in less time than torch is imported."""


@dataclass(frozen=True, slots=True)
class Slice:
    """From ``start`` to ``stop`` percent of a source."""

    start: int = 0
    stop: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 100:
            raise DataError(f"slice {self}: expected 0% <= start < stop <= 100%")

    def __str__(self) -> str:
        return f"[{self.start}%:{self.stop}%]"

    def rows(self, count: int) -> tuple[int, int]:
        """``(first, end)`` of ``count`` records, each rounded to the nearest."""
        return (count * self.start + 50) // 100, (count * self.stop + 50) // 100

    def of_records(self, count: int, place: str) -> range:
        """The numbers of its records. Raises DataError if there are none."""
        rows = range(*self.rows(count))
        if not rows:
            raise DataError(
                f"{place}{self}: expected one or more records, and this slice of {count} has none"
            )
        return rows

    def of_text(self, text: str) -> str:
        """The text between the two paragraph boundaries that are nearest to the percentages."""
        cuts = _cut_positions(text)
        first, end = (_nearest(cuts, len(text), percent) for percent in (self.start, self.stop))
        return text[first:end]


def _cut_positions(text: str) -> list[int]:
    """The places to cut ``text``: between paragraphs, or finer if these are too uneven.

    They depend on the text alone, never on the slice, so that slices fit together.
    """
    for pattern in _CUTS:
        cuts = [match.end() for match in pattern.finditer(text) if 0 < match.end() < len(text)]
        edges = [0, *cuts, len(text)]
        if cuts and max(b - a for a, b in itertools.pairwise(edges)) <= len(text) / 2 + 1:
            return cuts
    return []


def _nearest(cuts: list[int], length: int, percent: int) -> int:
    if percent in (0, 100) or not cuts:
        return 0 if percent < 100 else length
    return min(cuts, key=lambda cut: abs(100 * cut - percent * length))


def source_name(source: Source) -> str:
    """The name of ``source`` in messages."""
    parts = _parts(source)
    names = [part for part in parts if isinstance(part, str)]
    records = len(parts) - len(names)
    return ", ".join([*names, f"{records} records"] if records else names)


def load_records(
    source: Source, check: Check | None = None, columns: Collection[str] = ()
) -> list[Record]:
    """Read ``source``. A text file, and ``pydoc``, is one record with the field ``text``.

    In a ``datasets.Dataset`` a class label becomes the name of its class.

    Args:
        check: called with the first record of a file before the others are read.
        columns: those that the caller reads, if the file has them; of a parquet file others are
            skipped. By default all are read.
    """
    parts = _parts(source)
    if not parts:
        raise DataError("data: expected a file, a Hub dataset id or pydoc, got nothing")
    records: list[Record] = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            records += _load(part, check, columns)
        else:
            records.append(Record(part, f"record {number}"))
    return records


def check_records(source: Source, check: Check) -> None:
    """Check all records of small local files at once, so that no work begins with a wrong one.

    Other sources take longer to read, or need other libraries: their work checks them.

    Raises:
        DataError: as :func:`load_records` and ``check``.
    """
    if all(isinstance(part, str) and _is_small(part) for part in _parts(source)):
        check(load_records(source, check))


def _is_small(text: str) -> bool:
    """Whether a source is a file that is worth reading twice."""
    _, _, path = _place(text)
    return path.is_file() and path.suffix.lower() != ".parquet" and path.stat().st_size <= _SMALL


def _parts(source: Source) -> list[str | dict[str, Any]]:
    if isinstance(source, Mapping):
        raise DataError(
            f"data: expected one split, such as data[{next(iter(source), 'train')!r}], or a list "
            f"of records, got a mapping with {', '.join(map(repr, source)) or 'nothing'}"
        )
    source = table_rows(source)
    parts = [source] if isinstance(source, str | os.PathLike) else source
    try:
        return [dict(part) if isinstance(part, Mapping) else os.fsdecode(part) for part in parts]
    except TypeError:
        raise DataError(
            f"data: expected a file, a Hub dataset id, pydoc, or records, got {source!r:.80}"
        ) from None


def check_source(text: str) -> None:
    """Refuse a source that isn't there, a wrong slice or kind of file, or a malformed small file.

    Raises:
        DataError: as :func:`load_records`.
    """
    if _is_small(text):
        load_records(text)


def _place(text: str) -> tuple[str, Slice, Path]:
    """The name of a source, its slice, and its place if it is a file."""
    name, part = _split_slice(text)
    path = _path(name)
    if path is None:
        raise DataError(
            f"{name[:60]!r}: expected a file, a Hub dataset id or pydoc, got no possible name"
        )
    folder = _path(name.partition(":")[0])
    if path.is_file():
        check_suffix(path)
    elif name != "pydoc" and not (folder is not None and folder.is_dir()):
        if _LIKE_A_FILE.fullmatch(name):
            where = path.absolute().parent
            raise DataError(f"{name}: expected a file, and there is none of that name in {where}")
        if not _HUB_ID.fullmatch(name):
            raise DataError(
                f"{name!r}: expected a file that exists, pydoc, or a Hub dataset as org/name, "
                'org/name:split or org/name:config:split; in Python, a text itself is {"text": ...}'
            )
    return name, part, path


def _load(text: str, check: Check | None, columns: Collection[str]) -> list[Record]:
    name, part, path = _place(text)
    if path.is_file() and path.suffix.lower() not in TEXT_SUFFIXES:
        records = read_records(path, check, columns)
        rows = part.of_records(len(records), str(path))
        return records[rows.start : rows.stop]
    if path.is_file() or name == "pydoc":
        whole = read_text(path) if path.is_file() else pydoc_text()
        cut = part.of_text(whole)
        if not cut.strip():
            raise DataError(
                f"{name}{part}: expected text, and this slice of {len(whole)} characters has none"
            )
        return [Record({"text": cut}, name)]
    folder = Path(name.partition(":")[0]).expanduser()
    if folder.is_dir():
        expected = "a file in this folder, or a folder laid out as a dataset"
        return _dataset(name, part, expected, "FOLDER:split")
    return _dataset(name, part, "a Hub dataset", "org/name:split or org/name:config:split")


def _path(name: str) -> Path | None:
    """``name`` as a path; None if no file can have it: empty, too long, of no user."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        return None
    return path if name.strip() else None


def _split_slice(text: str) -> tuple[str, Slice]:
    sliced, path = _SLICED.fullmatch(text), _path(text)
    if sliced is None or (path is not None and path.exists()):  # a file may have such a name
        return text, Slice()
    percents = _PERCENTS.fullmatch(sliced[2])
    if percents is None:
        raise DataError(
            f"{text}: expected a slice in percent such as [:90%] or [10%:20%], got [{sliced[2]}]"
        )
    start, stop = percents.groups()
    return sliced[1], Slice(int(start or 0), 100 if stop is None else int(stop))


def pydoc_text() -> str:
    """The text of CPython's help topics, joined by blank lines. About 465 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics))


def _dataset(name: str, part: Slice, expected: str, form: str) -> list[Record]:
    """Read a dataset with the library datasets. A class label becomes the name of its class."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"{name}: expected {expected}; reading a dataset needs the library datasets, which is "
            "not installed; pip install 'modulora-core[data]'"
        ) from None
    dataset_id, *rest = os.path.expanduser(name).split(":")  # noqa: PTH111  a Hub id isn't a path
    config, split = rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"
    if rest and (Path(dataset_id) / _SAVED_ALONE).is_file():
        raise DataError(
            f"{name}: expected {dataset_id}, a dataset without splits, got the split {split!r}; "
            f"{dataset_id}[90%:] is a part of it"
        )
    is_saved = any((Path(dataset_id) / file).is_file() for file in _SAVED)
    if is_saved and config is not None:
        raise DataError(
            f"{name}: expected {dataset_id}:{split}, since a saved dataset has no configurations, "
            f"got {config!r} too"
        )
    try:
        if is_saved:
            saved = datasets.load_from_disk(dataset_id)
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(dataset_id, config, split=split)
    except Exception as error:  # readers of many formats raise what they like
        raise DataError(
            f"{name}: expected {expected} with the split {split!r} (say {form}), got "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    chosen = part.of_records(len(rows), name)
    return [
        Record(row, f"{name}, row {n + 1}")
        for n, row in zip(chosen, dataset_rows(rows.select(chosen)), strict=True)
    ]
