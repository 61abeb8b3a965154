"""Decode parquet files in a process of its own, within a limit of memory.

A few bytes of a parquet file may decode to gigabytes: encodings repeat values and prefixes, pages
are compressed, and the sizes in the metadata may be wrong. :mod:`modulora_core.data.parquet` runs
this file as a script. Each line of its standard input is a request, each answer a row of messages::

    {"path": ..., "columns": [...], "rows": n, "most_rows": bytes of n rows, "most": all bytes}
    length (8 bytes, little-endian), an Arrow stream of one batch;   ...;   0, then a line of JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc, parquet


class _TooMuchError(Exception):
    pass


def _batches(request: dict[str, Any]) -> Iterator[Any]:
    path = Path(request["path"])
    file, size = parquet.ParquetFile(path, memory_map=True), path.stat().st_size
    if file.metadata.num_rows > size:  # each becomes an object
        raise _TooMuchError(f"{size:,} rows, as many as bytes")
    names = file.schema_arrow.names
    # the reader says which columns it misses
    columns = [name for name in names if name in request["columns"]] or names
    fields = [file.schema_arrow.field(name) for name in columns]
    schema = pyarrow.schema([field.with_type(_plain(field.type)) for field in fields])
    rows, read = request["rows"], 0
    for found in file.iter_batches(rows, columns=columns, use_threads=False):
        batch = found.cast(schema)
        read += batch.nbytes
        if batch.nbytes > request["most_rows"]:
            raise _TooMuchError(f"{request['most_rows'] // 2**20} MiB in {rows} rows")
        if read > request["most"]:
            raise _TooMuchError(f"{request['most'] // 2**20} MiB of values")
        yield batch


def _plain(kind: Any) -> Any:
    """A type whose arrays hold each value as often as it occurs."""
    types = pyarrow.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pyarrow.list_(_plain(kind.value_type))
    if types.is_map(kind):
        return pyarrow.map_(_plain(kind.key_type), _plain(kind.item_type))
    views = {pyarrow.string_view(): pyarrow.string(), pyarrow.binary_view(): pyarrow.binary()}
    return views.get(kind, kind)


def _message(batch: Any) -> memoryview:
    sink = pyarrow.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema.remove_metadata()) as stream:
        stream.write_batch(batch)
    return memoryview(sink.getvalue())


def _limit_memory(nbytes: int) -> None:
    """Let this process take so many more bytes of memory. Only Linux tells and limits it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + nbytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def serve(nbytes: int) -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else prints among the answers
    pyarrow.set_cpu_count(1)
    _limit_memory(nbytes)
    for line in sys.stdin.buffer:
        end = {}
        try:
            for batch in _batches(json.loads(line)):
                message = _message(batch)
                answers.write(message.nbytes.to_bytes(8, "little"))
                answers.write(message)
        except _TooMuchError as error:
            end = {"most": str(error)}
        except (MemoryError, pyarrow.ArrowMemoryError):
            os._exit(1)
        except (
            Exception
        ) as error:  # pyarrow's own classes, UnicodeDecodeError, ArithmeticError, ...
            end = {"error": " ".join(str(error).split())[:200]}
        answers.write(bytes(8) + json.dumps(end).encode("ascii") + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
