"""``modulora conformance``: the kit in a process of its own, since the core doesn't depend on it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from modulora_core.cli.arguments import QuantizerOptions
from modulora_core.cli.kit import NAME, check_kit
from modulora_core.cli.terminal import Report, terminal

LAST_LEVEL = 7

PASSED, FAILED = 0, 1
"""pytest's exit codes of a run that took place; others mean that it didn't."""

_STDERR = 2
"""The file descriptor."""

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", show_default=False, help="One of `modulora list-quantizers`."),
]
Level = Annotated[
    int, typer.Option("--level", metavar="N", min=0, max=LAST_LEVEL, help="Run the levels 0 to N.")
]
ReportFolder = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", file_okay=False, show_default=False,
                 help="Write NAME.html, .json, .xml (JUnit), .svg (a badge) and .md (a support table) there."),
]  # fmt: skip
Certified = Annotated[
    bool,
    typer.Option("--certified", help="Fail for any skip but that of missing hardware, and for expected failures."),
]  # fmt: skip
DrawSeed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, show_default="another each time; it is printed",
                 help="Of the shapes and values that are drawn, to repeat a run."),
]  # fmt: skip
Golden = Annotated[
    Path | None,
    typer.Option("--golden", metavar="DIR", exists=True, file_okay=False, show_default=False,
                 help="Golden vectors to hold the quantizer to."),
]  # fmt: skip


def command(
    name: Name,
    option: QuantizerOptions = [],
    level: Level = LAST_LEVEL,
    report: ReportFolder = None,
    certified: Certified = False,
    seed: DrawSeed = None,
    golden: Golden = None,
) -> Report:
    """Check that a quantizer keeps its word: the conformance kit, level by level.

    Without -o it runs every configuration that the quantizer makes promises for. The exit code is 1 when a check failed, or
    when --certified isn't reached. The kit is a package of its own: pip install modulora-conformance.

    Examples:
      modulora conformance NAME
      modulora conformance NAME --report conformance --certified
      modulora conformance NAME -o bits=2 --level 3 --seed 7
    """
    _check_request(name, option, level, certified)
    words = [*(f"--option={text}" for text in option), f"--level={level}"]
    words += ["--certified"] if certified else []
    words += [f"--seed={seed}"] if seed is not None else []
    words += [f"--golden={golden}"] if golden is not None else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = report or Path(temporary)
        code, found = _run(name, words, folder)
    told = None if report is None else f"report: {report / name}.html"
    return Report(found, told, exit_code=code)


def _check_request(name: str, option: list[str], level: int, certified: bool) -> None:
    """Refuse what the kit would refuse, before its process is started."""
    from modulora_core.errors import OptionError
    from modulora_core.options import parse_options
    from modulora_core.registry import create

    check_kit("conformance")
    create(name, parse_options(option))
    if certified and level < LAST_LEVEL:
        raise OptionError(
            f"--certified: expected all levels, got --level {level}; leave out --level or --certified"
        )


def _run(name: str, words: list[str], folder: Path) -> tuple[int, dict[str, Any]]:
    """The exit code and the result of the kit's process, whose output goes to the terminal."""
    from modulora_core.errors import WorkError

    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)  # one of an earlier run must not be taken for this one's
    arguments = [sys.executable, "-m", NAME, name, *words, f"--report={folder}"]
    code = subprocess.run(arguments, stdout=_STDERR if terminal().json else None).returncode
    if code not in (PASSED, FAILED) or not file.exists():
        raise WorkError(
            f"conformance of {name}: expected the checks to run, got exit code {code} of pytest and "
            f"{'a result' if file.exists() else 'no result'}; what it printed says why"
        )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return code, found
