"""The frame around the commands: the list of them, dispatch, help, and what happens to results and errors."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main
from rich.markup import escape

from modulora_core.cli.arguments import Debug, Json
from modulora_core.cli.failures import report_failure
from modulora_core.cli.terminal import Report, Terminal

COMMANDS = (
    "demo",
    "list-quantizers",
    "quantize",
    "info",
    "finetune",
    "generate",
    "chat",
    "evaluate",
    "merge",
    "convert",
    "plan",
    "conformance",
    "bench",
    "new-plugin",
)
"""Every command, in the order of ``modulora --help``. ``list-quantizers`` is in ``list_quantizers.py``."""

_COMMON_FLAGS = {"json": Json, "debug": Debug}

_SETTINGS = {"help_option_names": ["--help", "-h"]}


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. See :func:`modulora_core.cli.main`."""
    _let_threads_sleep()
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    flags = set(words[: words.index("--")] if "--" in words else words)
    wants_help = not flags.isdisjoint(_SETTINGS["help_option_names"])
    # read before parsing, since what is wrong with the words is told as JSON too
    terminal = Terminal(json="--json" in flags and not wants_help, debug="--debug" in flags)
    try:
        with terminal.active():
            report = _dispatch(words)
        if report is not None:
            terminal.show(report)
            return report.exit_code
    except (
        BaseException
    ) as error:  # Ctrl-C and exits too: this is where the process's exit code is made
        return report_failure(error, terminal)
    return 0


def _let_threads_sleep() -> None:
    """Torch's idle threads soon give their cores away, unless the user decided; to be said before torch is imported.

    They would spin for milliseconds, and on a machine that other processes use too keep from a core the very thread that they
    wait for. So many turns last from one layer of a small model to the next: fewer, and each layer wakes them up
    (docs/performance-findings.md, Threads).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _dispatch(words: list[str]) -> Report | None:
    group = _group()
    with group.make_context("modulora", words) as context:
        report: Report | None = group.invoke(context)
        return report


class _LazyGroup(typer.core.TyperGroup):
    """Imports a command's module when the command is asked for, and all of them for ``modulora --help``."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  # click's signature
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002  # click's signature
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=2)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"expected one of {', '.join(COMMANDS)}"
            )
            ctx.fail(f"no such command: {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


@functools.cache
def load_command(name: str) -> Any:
    """Import ``modulora_core.cli.<name>`` and make click's command of its function ``command``."""
    module = importlib.import_module(f"modulora_core.cli.{name.replace('-', '_')}")
    function = module.command
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    parser = getattr(
        module, "PARSER", None
    )  # a command class of its own, such as one of word_lists.py
    app.command(name, cls=parser, help=help_text(function), context_settings=_SETTINGS)(
        _with_common_flags(function)
    )
    return typer.main.get_command(app)


@functools.cache
def _group() -> Any:
    app = typer.Typer(
        cls=_LazyGroup, add_completion=False, rich_markup_mode="rich", context_settings=_SETTINGS
    )
    app.callback(help=help_text(_modulora))(_modulora)
    return typer.main.get_command(app)


def _show_version(asked: bool) -> None:
    if asked:
        from modulora_core import __version__

        typer.echo(f"modulora {__version__}")
        raise typer.Exit


def _modulora(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Finetune quantized language models, with any quantizer.

    Examples:
      modulora list-quantizers
      modulora COMMAND --help
    """


def _with_common_flags(function: Callable[..., Report]) -> Callable[..., Report]:
    """The command with ``--json`` and ``--debug``, which :func:`run` has read already."""

    @functools.wraps(function)
    def command(**arguments: Any) -> Report:
        return function(
            **{name: value for name, value in arguments.items() if name not in _COMMON_FLAGS}
        )

    signature = inspect.signature(function, eval_str=True)
    flags = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
        )
        for name, annotation in _COMMON_FLAGS.items()
    ]
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *flags])  # type: ignore[attr-defined]
    return command


def help_text(function: Callable[..., object]) -> str:
    """A command's help: its docstring with the prose unwrapped and the examples kept line by line."""
    paragraphs = re.split(r"\n{2,}", escape(inspect.getdoc(function) or ""))
    return "\n\n".join(
        _kept(text) if _is_verbatim(text) else text.replace("\n", " ") for text in paragraphs
    )


def _is_verbatim(paragraph: str) -> bool:
    """Whether it has indented lines: a list of examples, or code."""
    return "\n " in paragraph or paragraph.startswith(" ")


def _kept(paragraph: str) -> str:
    """A style around an indented line keeps its indentation; a backspace in front keeps the lines apart."""
    lines = paragraph.splitlines()
    return "\b" + "\n".join(
        f"[cyan]{line}[/cyan]" if line.startswith(" ") else line for line in lines
    )
