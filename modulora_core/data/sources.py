"""What a SOURCE is: files, a Hub dataset or ``pydoc``, perhaps a slice of it, read as records.

::

    notes.txt  data.jsonl  data.json  data.csv  data.parquet      a file
    org/name   org/name:split   org/name:config:split             a Hub dataset, or a local folder laid out like one
    pydoc                                                         the English text that CPython ships
    anything[:90%]   anything[10%:20%]                            a part of it

A slice counts in whole percent, rounded to the nearest record as in Hugging Face datasets; a text is cut
between paragraphs. Slices that meet at a percentage share no record and leave none out.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modulora_core.data.files import TEXT_SUFFIXES, Record, read_records, read_text
from modulora_core.errors import DataError, MissingExtraError

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""One source or several, which are read one after the other."""

_SLICED = re.compile(r"(.+)\[([^\[\]]*)\]", re.DOTALL)
_PERCENTS = re.compile(r"\s*(?:(\d{1,3})%)?\s*:\s*(?:(\d{1,3})%)?\s*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:/]+){0,2}")
_PATHLIKE_SUFFIX = re.compile(
    r"\.(txt|md|jsonl|json|csv|tsv|parquet|gz|zip|xz|arrow)$", re.IGNORECASE
)

# Where a text may be cut, from the best place to the worst: after a blank line, a line, a word, anywhere.
_CUTS = (
    re.compile(r"\n(?:[ \t]*\n)+"),
    re.compile(r"\n+"),
    re.compile(r"\s+"),
    re.compile(r"(?s)."),
)


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

    def of_text(self, text: str) -> str:
        """The text between the two paragraph boundaries that are nearest to the percentages."""
        cuts = _cut_positions(text)
        first, end = (_nearest(cuts, len(text), percent) for percent in (self.start, self.stop))
        return text[first:end]


def _cut_positions(text: str) -> list[int]:
    """Where ``text`` may be cut, inside of it: between paragraphs, or finer where these are too uneven.

    Which kind is chosen depends on the text alone, never on the slice, so that slices fit together.
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
    """How a message names ``source``."""
    return ", ".join(os.fspath(part) for part in _parts(source))


def load_records(source: Source) -> list[Record]:
    """Read ``source``. A text file, and ``pydoc``, is one record with the field ``text``.

    Raises:
        DataError: nothing is there, or it is empty or malformed; the message names file and line.
        MissingExtraError: it takes an optional library that isn't installed.
    """
    parts = _parts(source)
    if not parts:
        raise DataError("data: expected a file, a Hub dataset id or pydoc, got nothing")
    return [record for part in parts for record in _load(part)]


def _parts(source: Source) -> list[str]:
    if isinstance(source, str | os.PathLike):
        return [os.fspath(source)]
    return [os.fspath(part) for part in source]


def _load(text: str) -> list[Record]:
    name, part = _split_slice(text)
    path = _path(name)
    if path is None:
        raise DataError(
            f"{name[:60]!r}: expected a file, a Hub dataset id or pydoc, got no possible name of one"
        )
    if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES:
        return _one_text(read_text(path), part, str(path))
    if path.is_file():
        return _rows(read_records(path), part, str(path))
    if name == "pydoc":
        return _one_text(pydoc_text(), part, "pydoc")
    folder = _path(name.partition(":")[0])
    is_folder = folder is not None and folder.is_dir()
    if _looks_like_file(name) and not is_folder:
        raise DataError(
            f"{name}: expected a file, and there is none of that name in {path.absolute().parent}"
        )
    if not (_HUB_ID.fullmatch(name) or is_folder):
        raise DataError(
            f"{name!r}: expected a file that exists, pydoc, or a Hub dataset as org/name, org/name:split or "
            "org/name:config:split"
        )
    return _hub(name, part, is_folder=is_folder)


def _path(name: str) -> Path | None:
    """``name`` as a path, or None where no file can be called so: empty, too long, of an unknown user."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError):
        return None
    return path if name.strip() else None


def _split_slice(text: str) -> tuple[str, Slice]:
    sliced, path = _SLICED.fullmatch(text), _path(text)
    if sliced is None or (path is not None and path.exists()):  # a file that is really called so
        return text, Slice()
    percents = _PERCENTS.fullmatch(sliced[2])
    if percents is None:
        raise DataError(
            f"{text}: expected a slice in percent such as [:90%] or [10%:20%], got [{sliced[2]}]"
        )
    start, stop = percents.groups()
    return sliced[1], Slice(int(start or 0), 100 if stop is None else int(stop))


def _looks_like_file(name: str) -> bool:
    return bool(
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
        or _PATHLIKE_SUFFIX.search(name)
    )


def _one_text(text: str, part: Slice, place: str) -> list[Record]:
    cut = part.of_text(text)
    if not cut.strip():
        raise DataError(
            f"{place}{part}: expected text, and this slice of {len(text)} characters has none"
        )
    return [Record({"text": cut}, place)]


def _rows(records: list[Record], part: Slice, place: str) -> list[Record]:
    first, end = part.rows(len(records))
    if first == end:
        raise _no_rows(place, part, len(records))
    return records[first:end]


def _no_rows(place: str, part: Slice, count: int) -> DataError:
    return DataError(
        f"{place}{part}: expected one or more records, and this slice of {count} has none"
    )


def pydoc_text() -> str:
    """The text of CPython's help topics, by name, with blank lines between them. About 465 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics))


def _hub(name: str, part: Slice, *, is_folder: bool) -> list[Record]:
    try:
        import datasets
    except ImportError:
        needs = (
            "a folder; expected a file, or for a folder laid out as a dataset"
            if is_folder
            else "reading a Hub dataset needs"
        )
        raise MissingExtraError(
            f"{name}: {needs} the library datasets, which is not installed; pip install 'modulora-core[data]'"
        ) from None
    dataset_id, *rest = os.path.expanduser(name).split(":")  # noqa: PTH111  a Hub id isn't a path
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        rows = datasets.load_dataset(dataset_id, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        expected = (
            f"a file in this folder, or a folder laid out as a dataset with the split {split!r} (say FOLDER:split)"
            if is_folder
            else f"a Hub dataset with the split {split!r} (say org/name:split or org/name:config:split)"
        )
        raise DataError(
            f"{name}: expected {expected}, got {type(error).__name__}: {error}"
        ) from error
    first, end = part.rows(len(rows))
    if first == end:
        raise _no_rows(name, part, len(rows))
    label_names = getattr(rows.features.get("label"), "names", None)
    return [
        Record(_with_label_name(row, label_names), f"{name}, row {number}")
        for number, row in enumerate(rows.select(range(first, end)), start=first + 1)
    ]


def _with_label_name(row: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """Put a class's name in place of its number; -1 is how datasets mark a row without a label."""
    if names is None or row["label"] is None:
        return row
    return {**row, "label": names[row["label"]] if row["label"] >= 0 else None}
