"""Read parquet files by pyarrow, some rows at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modulora_core.data.tables import table_row
from modulora_core.errors import DataError, MissingExtraError

_ROWS = 64
"""Rows that are decoded at once."""


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
    import pyarrow
    from pyarrow import parquet

    number = read = 0
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        names = [name for name in file.schema_arrow.names if name in columns]
        # with no known column, the reader of records says which ones it misses
        for batch in file.iter_batches(_ROWS, columns=names or None, use_threads=False):
            read += batch.nbytes
            if batch.nbytes > most_rows or read > most:
                limit = most_rows if batch.nbytes > most_rows else most
                raise DataError(
                    f"{path}: expected at most {limit // 2**20} MiB of values"
                    f"{f' in {_ROWS} rows' if limit == most_rows else ''}, got more; cut it into "
                    "several files"
                )
            for row in batch.to_pylist():
                number += 1
                yield table_row(row), f"row {number}"
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, got {error}") from None
    except (pyarrow.ArrowException, OSError, ArithmeticError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: expected a parquet file, got {reason}") from None
