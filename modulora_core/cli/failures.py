"""What every failure looks like: one sentence, and an exit code."""

from __future__ import annotations

import traceback
from typing import Any

import typer

from modulora_core.cli.terminal import Terminal
from modulora_core.errors import ModuLoRAError, RequestError

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

UsageError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError")
"""click's. typer brings click along since 0.26 and depended on it before; this finds it in both."""

_Context: Any = next(cls for cls in typer.Context.__mro__ if cls.__module__.endswith("click.core"))
"""click's, found in the same way."""


def report_failure(error: BaseException, terminal: Terminal) -> int:
    """Tell about ``error`` and return the exit code: 2 for a wrong request, 1 for work that failed, 130 for Ctrl-C."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        goes_on = "; the same command with --resume goes on" if _can_resume(error) else ""
        terminal.note(f"interrupted{goes_on}")
        return INTERRUPTED
    if terminal.debug:
        terminal.note("".join(traceback.format_exception(error)).rstrip())
    kind, message, code = _described(error)
    if terminal.json:
        terminal.write_object({"error": {"kind": kind, "message": message}})
    terminal.note(f"error: {message}")
    return code


def _can_resume(error: BaseException) -> bool:
    """Whether the command that ``error`` came out of has ``--resume``.

    click has dropped its contexts by now, but the frames that the error went through still hold them: the last is the command's.
    """
    contexts = (frame.f_locals.get("ctx") for frame, _ in traceback.walk_tb(error.__traceback__))
    commands: list[Any] = [ctx.command for ctx in contexts if isinstance(ctx, _Context)]
    return bool(commands) and any("--resume" in parameter.opts for parameter in commands[-1].params)


def _described(error: BaseException) -> tuple[str, str, int]:
    if isinstance(error, ModuLoRAError):
        return error.kind, str(error), error.exit_code
    if isinstance(error, UsageError):
        return "UsageError", _usage(error), RequestError.exit_code
    if isinstance(error, SystemExit):  # a library's sys.exit("message")
        return "SystemExit", _one_line(str(error.code)), 1
    about = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    text = _one_line(f"{type(error).__name__}: {error}".rstrip(": ") + about)
    return type(error).__name__, f"unexpected {text}; run again with --debug for the traceback", 1


def _usage(error: BaseException) -> str:
    """A sentence from click's message, with near misses for a misspelled option, and where the help is."""
    message = _one_line(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    message = message.replace("Value error, ", "").replace(
        "Input should be", "expected"
    )  # pydantic's, in typer
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption":
        near = getattr(error, "possibilities", None)
        message = f"no such option: {option}" + (
            f"; did you mean {' or '.join(near)}?" if near else ""
        )
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    return message[:1].lower() + message[1:] + where


def _one_line(text: str) -> str:
    return " ".join(text.split())
