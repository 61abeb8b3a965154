"""Methods take turns, each in a process of its own.

One library's settings, threads or crash then affect no other, and other work on the machine slows
all methods alike. While one process measures, the others wait. A *job* is an object in such a
process: ``build(*arguments)`` makes it there, and :meth:`Process.ask` calls its methods by name.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from modulora_conformance.bench.timing import Timing

Build = Callable[..., object]


class NotMeasuredError(Exception):
    """A method cannot be measured; the message says why."""


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, NotMeasuredError):
        return lines[0]
    return ": ".join([type(error).__name__, *(line[:200] for line in lines[:1])])


class Job(Protocol):
    """An object in this process or in another one."""

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the object. Raises NotMeasuredError if it fails."""

    def end(self) -> None: ...


class Here:
    """A job in this process, for tests and debuggers."""

    def __init__(self, build: Build, *arguments: Any) -> None:
        self._job = _tried(build, *arguments)

    def ask(self, name: str, *arguments: Any) -> Any:
        return _tried(getattr(self._job, name), *arguments)

    def end(self) -> None:
        del self._job


def _tried(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:  # a library may raise anything
        raise NotMeasuredError(reason(error)) from error


class Process:
    """A job in a process of its own.

    Args:
        build: a function of a module; it and the arguments are pickled.
        verbose: let the process print, to stderr.
        timeout: seconds to wait for an answer.

    Raises:
        NotMeasuredError: the job cannot be built, the process died, or it gave no answer in time.
    """

    def __init__(
        self, build: Build, *arguments: Any, verbose: bool = False, timeout: float = 7200.0
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._timeout = timeout
        words = (theirs, verbose, build, arguments)
        self._process = context.Process(target=_serve, args=words, daemon=True)
        self._process.start()
        theirs.close()  # the end of the process then ends the pipe
        self._answer()

    def ask(self, name: str, *arguments: Any) -> Any:
        with contextlib.suppress(OSError):  # the process has died: there is no answer
            self._pipe.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(self._timeout):
                self.end()
                raise NotMeasuredError(f"no answer within {self._timeout:g} s")
            is_good, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode  # negative for a signal
            raise NotMeasuredError(f"its process ended with exit code {code}") from None
        if not is_good:
            raise NotMeasuredError(answer)
        return answer

    def end(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, verbose: bool, build: Build, arguments: tuple[Any, ...]) -> None:
    """Build the job, then answer until the pipe ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(2 if verbose else nowhere, stream)  # stdout is the parent's, for tables
    warnings.simplefilter("ignore")  # libraries warn about themselves
    job: object = None
    call: Callable[..., Any] = build
    while True:
        try:
            answer = call(*arguments)
            if job is None:
                job, answer = answer, None
            pipe.send((True, answer))
        except Exception as error:  # a library may raise anything
            traceback.print_exc(file=sys.stderr)
            pipe.send((False, reason(error)))
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        call = getattr(job, name)


Key = tuple[str, str]
"""A method and a dtype."""


@dataclass
class Turns:
    """The results of turns, by method and dtype.

    Attributes:
        seconds: one value for each turn; a slow method takes fewer turns.
        facts: other results.
        failed: why a method was not measured.
    """

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    facts: dict[Key, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)

    def results(self, base: Key, **case: Any) -> Iterator[dict[str, Any]]:
        """A dict for each method and dtype: ``method``, ``dtype``, ``case``, facts, and times.

        Times are ``seconds``, ``low_seconds``, ``noise``, ``turns`` and ``samples``. If ``base``
        was measured, ``ratio`` is the median of the turns' ratios to it, and ``low_ratio`` the
        ratio of the tenth percentiles.
        """
        for key, samples in self.seconds.items():
            times = Timing(tuple(samples)).to_json() | {"samples": samples}
            if base in self.seconds:
                common = zip(samples, self.seconds[base], strict=False)
                mine, dense = (Timing(each) for each in zip(*common, strict=True))
                times |= {"ratio": mine.beside(dense), "low_ratio": mine.low / dense.low}
            yield {"method": key[0], "dtype": key[1], **case, **self.facts[key], **times}


def take_turns(
    jobs: Mapping[Key, tuple[Job, tuple[Any, ...]]], repeats: int, limit: float
) -> Turns:
    """Ask each job for ``prepare(*arguments)`` once, then ``repeats`` times for ``turn``.

    ``prepare`` returns a dict of facts, ``turn`` its seconds and such a dict. Every other round
    goes backwards, so that no job always follows the same one.

    Args:
        jobs: each with its arguments.
        repeats: the number of turns.
        limit: seconds; a job that took so long takes no more turns.
    """
    turns = Turns()
    for key, (job, arguments) in jobs.items():
        try:
            turns.facts[key] = dict(job.ask("prepare", *arguments))
            turns.seconds[key] = []
        except NotMeasuredError as error:
            turns.failed[key] = str(error)
    for repeat in range(repeats):
        waiting = [key for key, taken in turns.seconds.items() if sum(taken) < limit]
        for key in waiting if repeat % 2 == 0 else reversed(waiting):
            job, arguments = jobs[key]
            try:
                seconds, facts = job.ask("turn", *arguments)
            except NotMeasuredError as error:
                turns.failed[key] = str(error)
                del turns.seconds[key]
                continue
            turns.seconds[key].append(seconds)
            turns.facts[key] |= facts
    return turns
