"""``modulora conformance``."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from modulora_conformance.levels import HIGHEST
from modulora_core.cli.arguments import argument, option
from modulora_core.cli.terminal import Report, terminal

PASSED, FAILED = 0, 1
"""pytest's exit codes of a run that took place. Others mean that it didn't."""

Name = Annotated[str | None, argument("NAME", "A quantizer of `modulora list-quantizers`.")]
Options = Annotated[
    list[str],
    option(
        "--option -o KEY=VALUE",
        "Set an option of the quantizer. Repeatable. Without it: each set that its spec promises.",
    ),
]
Level = Annotated[int, option("--level N", "Run the levels 0 to N.", min=0, max=HIGHEST)]
Select = Annotated[str | None, option("-k EXPRESSION", "Run the checks whose names match.")]
StopFirst = Annotated[bool, option("--exitfirst -x", "Stop at the first failure.")]
Traceback = Annotated[
    Literal["no", "short", "long", "line", "native", "auto"],
    option("--tb STYLE", "Show tracebacks: no, short, long, line, native or auto."),
]
ReportFolder = Annotated[
    Path | None,
    option(
        "--report DIR",
        "Write NAME.html, .json, .xml (JUnit), .svg (a badge) and .md (a table) to DIR.",
        file_okay=False,
    ),
]
Certified = Annotated[
    bool,
    option("--certified", "Fail too for expected failures, and for skips other than hardware's."),
]
DrawSeed = Annotated[
    int | None,
    option("--seed N", "Seed of random shapes and values.", min=0, default="today's, printed"),
]
Quick = Annotated[
    bool,
    option("--quick", "Count no branches, try no sizes that the plugin names. Never certified."),
]
Golden = Annotated[
    Path | None,
    option("--golden DIR", "Compare with the golden vectors in DIR.", exists=True, file_okay=False),
]
Measure = Annotated[bool, option("--measure", "Run no check: print the promises to paste.")]
ListChecks = Annotated[bool, option("--list", "Run no check: list them, and how to mend each.")]

PANELS = {"Information": ["measure", "list_checks"]}


def command(
    name: Name = None,
    option: Options = [],
    level: Level = HIGHEST,
    select: Select = None,
    exitfirst: StopFirst = False,
    tb: Traceback = "no",
    report: ReportFolder = None,
    certified: Certified = False,
    seed: DrawSeed = None,
    quick: Quick = False,
    golden: Golden = None,
    measure: Measure = False,
    list_checks: ListChecks = False,
) -> Report:
    """Check that a quantizer keeps its promises, with the conformance kit.

    Without -o it checks every configuration for which the quantizer makes promises. The exit code
    is 1 if a check failed, or if --certified isn't reached. For a plugin that was written for an
    older protocol it says what to change.

    Examples:
        modulora conformance NAME
        modulora conformance NAME --level 1 -x
        modulora conformance NAME -k magnitude --tb short
        modulora conformance NAME -o bits=3 --measure
        modulora conformance NAME --report conformance --certified
        modulora conformance --list
    """
    if list_checks:
        return _list()
    left_out: dict[str, object] = {f"--level {level}": level < HIGHEST, "--quick": quick}
    left_out |= {"-k": select, "-x": exitfirst}
    name = _check_request(name, certified, left_out)
    if (older := _older(name)) is not None:
        return older
    _check_plugin(name, option)
    if measure:
        return _measured(name, option)
    if report is not None:
        _make(report)
    words = [f"--tb={tb}", f"--conformance-level={level}"]
    words += [f"--quantizer-option={each}" for each in option]
    words += ["-k", select] if select is not None else []
    words += ["--exitfirst"] if exitfirst else []
    words += ["--certified"] if certified else []
    words += ["--quick"] if quick else ["--branches"]
    given = {"conformance-report": report, "hypothesis-seed": seed, "golden": golden}
    words += [f"--{name}={value}" for name, value in given.items() if value is not None]
    terminal().stop_working()  # pytest prints
    from modulora_conformance.run import run

    code, result, fault = run(name, words, report)
    if code not in (PASSED, FAILED) or result is None:
        _refuse(name, code, select, fault)
    text = None if report is None else f"report: {report / name}.html"
    return Report(result, text, exit_code=code)


def _measured(name: str, option: list[str]) -> Report:
    from modulora_conformance.measure import as_code, measured, packing_memory

    promises, memory = measured(name, option), packing_memory(name, option)
    found = {"quantizer": name, "promises": [each.model_dump() for each in promises]}
    return Report(found | {"packing_memory": memory}, as_code(promises, memory))


def _list() -> Report:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from modulora_conformance.checks import explained
    from modulora_conformance.suite import QuantizerConformance

    found = list(explained(QuantizerConformance))
    lines: list[Text | Padding] = []
    for each in found:
        lines.append(Text(f"{each.level}  {each.check}", style="bold"))  # whole: -k takes the name
        lines.append(Padding(Text(f"{each.fault} {each.advice}".rstrip()), (0, 0, 0, 4)))
    return Report({"checks": [check._asdict() for check in found]}, Group(*lines))


def _check_request(name: str | None, certified: bool, left_out: Mapping[str, object]) -> str:
    """Refuse flags that don't fit together, and return the quantizer's name."""
    from modulora_core.errors import OptionError

    if name is None:
        raise OptionError("NAME: expected a quantizer of `modulora list-quantizers`, got none")
    given = [flag for flag, value in left_out.items() if value]
    if certified and given:
        raise OptionError(
            f"--certified: expected every check, got {' and '.join(given)} too; leave out one"
        )
    return name


def _older(name: str) -> Report | None:
    """The report of a plugin of an older protocol; None for others."""
    from modulora_conformance.protocols import changes_since
    from modulora_core.registry import entries
    from modulora_core.spec import PROTOCOL

    named = [each for each in entries() if each.name == name and each.status == "incompatible"]
    for entry in named:
        assert entry.spec is not None  # its protocol is known
        if changes := changes_since(entry.spec.protocol):
            found = {"quantizer": name, "protocol": entry.spec.protocol, "changes": changes}
            first = f"{name} of {entry.origin} is written for protocol {entry.spec.protocol}."
            lines = [f"* {change}" for change in changes]
            text = "\n".join([f"{first} For protocol {PROTOCOL}:", *lines])
            return Report(found, text, exit_code=FAILED)
    return None


def _check_plugin(name: str, option: list[str]) -> None:
    """Refuse a plugin that can't be used, and wrong options of it."""
    from modulora_conformance.protocols import advice_on
    from modulora_core.errors import BrokenPluginError, UnknownQuantizerError
    from modulora_core.options import parse_options
    from modulora_core.registry import create

    try:
        create(name, parse_options(option))
    except BrokenPluginError as error:
        where = _where(error.__cause__ or _import_error(name))
        advice = "mend it, and run again; --debug shows the traceback"
        changed = advice_on(error.fault)
        raise BrokenPluginError(f"{error.fault}{where}", changed or advice) from error
    except UnknownQuantizerError as error:
        hint = "if it is yours, run pip install -e . in its folder"
        raise UnknownQuantizerError(f"{error}; {hint}") from None


def _make(report: Path) -> None:
    """Make the folder before the run, which takes a minute."""
    from modulora_core.errors import OutputError

    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"--report {report}: expected a folder to write to, got: {error.strerror}"
        ) from None


def _import_error(name: str) -> BaseException | None:
    """Give the error of an entry point's module, which the registry reports in one line."""
    from importlib.metadata import entry_points

    from modulora_core.hookspecs import PROJECT

    for point in entry_points(group=PROJECT, name=name):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            return error
    return None


def _where(error: BaseException | None) -> str:
    """Name the line at which an import failed; a syntax error names its own."""
    if error is None or isinstance(error, SyntaxError):
        return ""
    import pydantic

    frames = traceback.extract_tb(error.__traceback__)
    others = ("<", sys.base_prefix, str(Path(pydantic.__file__).parent))  # which checks a spec
    own = [f for f in frames if not f.filename.startswith(others)] or frames
    return f" ({own[-1].filename}, line {own[-1].lineno})"


def _refuse(name: str, code: int, select: str | None, fault: str) -> NoReturn:
    """Raise an error for a run of pytest that ran no check."""
    import pytest

    from modulora_core.errors import OptionError, WorkError

    if fault:
        raise WorkError(
            f"conformance of {name}: expected the checks to run, got an error before the first: "
            f"{fault}; --tb short shows where"
        )
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if select is not None and code in (
        pytest.ExitCode.NO_TESTS_COLLECTED,
        pytest.ExitCode.USAGE_ERROR,
    ):
        raise OptionError(
            f"-k {select!r}: expected a part of a check's name, got an expression that selects "
            "none; `modulora conformance --list` has the names"
        )
    raise WorkError(
        f"conformance of {name}: expected the checks to run, got exit code {code} of pytest; "
        "its output above says why"
    )
