"""Methods that take turns, each in a process of its own.

Side effects of one library (global settings, pools of threads, a crash) so fall on nobody else, and what else the machine does falls
on all: a turn asks every process for one measurement, one after the other, while the others wait. Seconds are taken inside of the
process that works.

A *job* is built in the process: ``build(*arguments)`` gives an object, whose methods :meth:`Process.ask` calls by name.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from modulora_conformance.bench.timing import Timing

VERBOSE = "BENCHMARK_VERBOSE"
"""In the environment: processes may print, tracebacks too."""


_STARTING = threading.Lock()
"""The standard streams are all threads': while one has them lead elsewhere, another would take that for where they led before."""


class NotMeasuredError(Exception):
    """A method can't be measured; the message is the reason."""


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    first = next((line.strip() for line in lines if line.strip()), "")
    if isinstance(error, NotMeasuredError):
        return first
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


class Asked(Protocol):
    """Where a job lives: :class:`Process` or :class:`Here`."""

    def ask(self, name: str, *arguments: Any) -> Any: ...

    def end(self) -> None: ...


class Here:
    """A job in this process: for tests, and for a debugger."""

    def __init__(self, build: Callable[..., object], *arguments: Any) -> None:
        try:
            self._job = build(*arguments)
        except Exception as error:  # whatever a library raises
            raise NotMeasuredError(reason(error)) from error

    def ask(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._job, name)(*arguments)
        except Exception as error:  # whatever a library raises
            raise NotMeasuredError(reason(error)) from error

    def end(self) -> None:
        del self._job


class Process:
    """A job in a process of its own.

    Args:
        build: a function of a module; it and the arguments are pickled.
        timeout: seconds to wait for an answer.

    Raises:
        NotMeasuredError: the job can't be built; the process died; it gave no answer in time.
    """

    def __init__(
        self, build: Callable[..., object], *arguments: Any, timeout: float = 1800.0
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._timeout = timeout
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        with _STARTING, _output_for_children():
            self._process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self._answer()

    def ask(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._connection.poll(self._timeout):
            self.end()
            raise NotMeasuredError(f"no answer within {self._timeout:g} s")
        try:
            good, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise NotMeasuredError(_last_word(self._process.exitcode)) from None
        if not good:
            raise NotMeasuredError(answer)
        return answer

    def end(self) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _output_for_children() -> Iterator[None]:
    """What processes that start now print isn't part of a table: it goes to the standard error, or nowhere unless verbose.

    They get their streams from here, since libraries print already while the job's modules are imported.
    """
    before = os.dup(1), os.dup(2)
    if VERBOSE in os.environ:
        os.dup2(2, 1)
    else:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    try:
        yield
    finally:
        for saved, stream in zip(before, (1, 2), strict=True):
            os.dup2(saved, stream)
            os.close(saved)


def _last_word(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _serve(
    connection: Connection, build: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    job: object = None
    request: tuple[str, tuple[Any, ...]] | None = None
    while True:
        try:
            if request is None:
                job = build(*arguments)
                answer = None
            else:
                answer = getattr(job, request[0])(*request[1])
            connection.send((True, answer))
        except Exception as error:  # whatever a library raises
            traceback.print_exc(file=sys.stderr)
            connection.send((False, reason(error)))
        try:
            request = connection.recv()
        except EOFError:
            return


Key = tuple[str, str]
"""A method and a dtype."""


@dataclass
class Turns:
    """What turns gave, by method and dtype.

    Attributes:
        seconds: a value a turn; where a method was too slow for all turns, those of the first ones.
        told: what else it told.
        failed: why it wasn't measured.
    """

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    told: dict[Key, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)

    def results(self, base: Key, **case: Any) -> Iterator[dict[str, Any]]:
        """A dict for each that was measured: ``method``, ``dtype``, ``case``, what was told, and the comparison."""
        for key in self.seconds:
            yield {
                "method": key[0],
                "dtype": key[1],
                **case,
                **self.told[key],
                **self.compared(key, base),
            }

    def compared(self, key: Key, base: Key) -> dict[str, Any]:
        """The seconds, and their ratio to the base's in the same turns: of medians, and of low percentiles.

        Returns:
            ``seconds``, ``low_seconds``, ``noise``, ``turns``, ``samples``, and, if the base was measured, ``ratio`` (the median of the
            turns' ratios) and ``low_ratio`` (of the tenth percentiles).
        """
        timing = Timing(tuple(self.seconds[key]))
        result = timing.to_json() | {"samples": list(timing.turns)}
        if base in self.seconds:
            common = min(len(self.seconds[base]), len(timing.turns))
            mine, its = Timing(timing.turns[:common]), Timing(tuple(self.seconds[base][:common]))
            result |= {"ratio": mine.beside(its), "low_ratio": mine.low / its.low}
        return result


def take_turns(
    jobs: Mapping[Key, tuple[Asked, tuple[Any, ...]]], repeats: int, limit: float
) -> Turns:
    """Ask each job for ``prepare(*arguments)`` once, then for ``turn(*arguments)``, in turn, ``repeats`` times.

    ``prepare`` returns a dict of what it tells; ``turn`` its seconds and such a dict. A job that fails is left out from then on; one that
    has taken ``limit`` seconds takes no more turns. Every other round goes backwards, so that nobody always follows the same one.
    """
    turns = Turns()
    for key, (job, arguments) in jobs.items():
        try:
            turns.told[key] = dict(job.ask("prepare", *arguments))
            turns.seconds[key] = []
        except NotMeasuredError as error:
            turns.failed[key] = str(error)
    for repeat in range(repeats):
        waiting = [key for key, taken in turns.seconds.items() if sum(taken) < limit]
        for key in waiting if repeat % 2 == 0 else reversed(waiting):
            job, arguments = jobs[key]
            try:
                seconds, told = job.ask("turn", *arguments)
            except NotMeasuredError as error:
                turns.failed[key] = str(error)
                del turns.seconds[key]
                continue
            turns.seconds[key].append(seconds)
            turns.told[key] |= told
    return turns
