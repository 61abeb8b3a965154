"""Work on files from strangers in processes with limits, started when needed and kept.

A process that breaks its limits ends, and this one goes on with a sentence about the file.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

Process = subprocess.Popen[bytes]
_ALL: set[Process] = set()


@contextmanager
def worker(script: Path, *arguments: str) -> Iterator[Process]:
    """Give a process that runs ``script``, with pipes to its standard input and output.

    Each thread has its own. If the block raises an exception, the process is ended, since its
    output may be half read. Otherwise the next block may get it.
    """
    idle = _idle(os.getpid(), script, arguments)
    process = idle.pop() if idle else None
    if process is None or process.poll() is not None:
        # -P: the modules beside the script aren't top-level ones
        command = [sys.executable, "-P", str(script), *arguments]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        _ALL.add(process)
    try:
        yield process
    except BaseException:
        _end(process)
        raise
    idle.append(process)


@cache
def _idle(_process: int, _script: Path, _arguments: tuple[str, ...]) -> list[Process]:
    """The idle processes that this process started; a fork must not use its parent's."""
    return []


def _end(process: Process) -> None:
    _ALL.discard(process)
    process.kill()
    process.communicate()


@atexit.register
def _end_all() -> None:
    for process in [*_ALL]:
        _end(process)


def ask(process: Process, line: bytes) -> None:
    """Write a request. If the process has ended, the caller reads no answer and learns it then."""
    assert process.stdin is not None
    try:
        process.stdin.write(line + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass
