"""Turn an error into one sentence and an exit code."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from contextlib import suppress

import typer

from modulora_core import distributed
from modulora_core.cli.terminal import Terminal
from modulora_core.errors import ModuLoRAError, RequestError, WorkError, first_line, lacks_memory
from modulora_core.models.system_errors import said_by_system

SIGNALLED = 128
"""Shells add a signal's number to it: 130 after Ctrl-C, 143 after SIGTERM."""


def report_failure(error: BaseException, terminal: Terminal) -> int:
    """Print the error. Return 2 for a wrong request, 1 for failed work, 130 for Ctrl-C.

    If nobody reads the output any more, as in ``modulora --help | head -1``, print nothing.
    """
    if isinstance(error, BrokenPipeError) and _reader_left():
        # Python would write the rest at its exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 0:
        return error.code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        terminal.note("; ".join(["interrupted", *_notes(error)]))
        return SIGNALLED + getattr(error, "signal", signal.SIGINT)
    if terminal.debug:
        terminal.note("".join(traceback.format_exception(error)).rstrip())
    kind, message, code = _described(error)
    agreed = False
    if code == RequestError.exit_code:  # the first process prints it for all, if all know it
        shared = error if isinstance(error, ModuLoRAError) else RequestError(message)
        if not distributed.are_connected():  # later the others may be at work, and don't answer
            with suppress(ModuLoRAError):
                distributed.agree(shared)
        agreed = shared.agreed
    if terminal.silent and not agreed:
        terminal.silent, terminal.json = False, False
        message = f"process {distributed.rank()} of {distributed.world_size()}: {message}"
    if terminal.json:
        with suppress(WorkError):  # stdout can't be written, which the note says
            terminal.write_object({"error": {"kind": kind, "message": message}})
    terminal.note(f"error: {message}")
    if agreed:
        with suppress(ModuLoRAError):
            distributed.barrier()  # a launcher ends the others as soon as one process has ended
    return code


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _described(error: BaseException) -> tuple[str, str, int]:
    if (starved := lacks_memory(error)) is not None:
        return "MemoryError", (
            f"out of memory: the system gave this process no more ({first_line(starved)}); free "
            "some, raise the process's limit, or make the work smaller"
        ), 1  # fmt: skip
    if isinstance(error, ModuLoRAError):
        return error.kind, _one_line(str(error)), error.exit_code
    about = "".join(f" ({note})" for note in _notes(error))
    if isinstance(error, OSError) and (said := said_by_system(error)) is not None:
        return type(error).__name__, _one_line(said + about), 1
    if type(error).__name__ == "PanicException":  # of a library in Rust, on a file that it read
        text = f"a library fails on the model's tokenizer: {error}{about}; take another tokenizer"
        return "ModelError", _one_line(text), RequestError.exit_code
    if hasattr(error, "format_message"):  # click's, which typer carries under changing names
        return "UsageError", _usage(error), RequestError.exit_code
    if isinstance(error, SystemExit):  # a library's, which has not done the work
        text = error.code if isinstance(error.code, str) else f"unexpected exit({error.code})"
        return "SystemExit", _one_line(f"{text}{about}"), 1
    text = _one_line(f"{type(error).__name__}: {error}".rstrip(": ") + about)
    return type(error).__name__, f"unexpected {text}; run again with --debug for the traceback", 1


def _usage(error: BaseException) -> str:
    """Make one sentence of typer's message."""
    message = _one_line(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    message = message.replace("Input should be", "expected")
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    return message[:1].lower() + message[1:] + where


def _one_line(text: str) -> str:
    return " ".join(text.split())
