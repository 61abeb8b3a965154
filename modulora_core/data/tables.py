"""Read tables and parquet files as dicts, without the nulls that a table adds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modulora_core.errors import DataError, MissingExtraError


def table_rows(source: Any) -> Any:
    """The rows of a table of pandas, polars, pyarrow or datasets; other sources as they are."""
    if hasattr(source, "iterrows"):  # pandas, where a missing value is NaN
        filled = source.astype(object).where(source.notna(), None)
        return [table_row(_without_arrays(row)) for row in filled.to_dict("records")]
    for method in ("to_dicts", "to_pylist"):  # polars; pyarrow
        if hasattr(source, method):
            return map(table_row, getattr(source, method)())
    if hasattr(source, "features"):  # datasets
        return dataset_rows(source)
    return source


def _without_arrays(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _without_arrays(each) for name, each in value.items()}
    return list(map(_without_arrays, value)) if isinstance(value, list) else value


def dataset_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a ``datasets.Dataset``. A class label becomes the name of its class."""
    types = dataset.features or {}
    names = getattr(types.get("label"), "names", None)
    return (_with_class_name(table_row(row, types), names) for row in dataset)


def _with_class_name(row: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    if names is None or row.get("label") is None:
        return row
    # datasets mark a row without a label by -1
    return {**row, "label": names[row["label"]] if row["label"] >= 0 else None}


def table_row(
    row: Mapping[str, Any], types: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """A row without the nulls in its structs: a table adds them, so that all rows have all keys.

    Nulls in JSON text and in the type Json of the library datasets are the user's, and stay.

    Args:
        row: the values of all columns; a null column stays.
        types: the ``features`` of a ``datasets.Dataset``.
    """
    return {name: _without_nulls(each, types.get(name)) for name, each in row.items()}


def _without_nulls(value: Any, kind: Any) -> Any:
    if type(kind).__name__ == "Json":
        return value
    if isinstance(value, dict):
        kinds = kind if isinstance(kind, dict) else {}
        return {
            name: _without_nulls(each, kinds.get(name))
            for name, each in value.items()
            if each is not None
        }
    # a list of tokens, which is long, is not walked
    if isinstance(value, list) and not {dict, list}.isdisjoint(map(type, value)):
        return [_without_nulls(each, getattr(kind, "feature", None)) for each in value]
    return value


def parquet_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[Any, str]]:
    """The rows of a file, each with its place.

    Other ``columns`` are skipped, unless the file has none of these.
    """
    if find_spec("pyarrow") is None:
        raise MissingExtraError(
            f"{path}: reading parquet needs pyarrow, which is missing; "
            "pip install 'modulora-core[data]'"
        )
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        names = [name for name in file.schema_arrow.names if name in columns]
        # with no known column, the reader of records says which ones it misses
        for batch in file.iter_batches(columns=names or None, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield table_row(row), f"row {number}"
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, got {error}") from None
    except (pyarrow.ArrowException, OSError, ArithmeticError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: expected a parquet file, got {reason}") from None
