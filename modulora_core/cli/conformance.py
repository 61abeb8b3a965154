"""``modulora conformance``. The kit runs in its own process, since the core doesn't need it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from modulora_core.cli.arguments import Quantizer, QuantizerOptions, option
from modulora_core.cli.terminal import Report, terminal

KIT = "modulora_conformance"
LAST_LEVEL = 7

PASSED, FAILED = 0, 1
"""pytest's exit codes of a run that took place. Others mean that it didn't."""

_STDERR = 2
"""The file descriptor."""

Level = Annotated[int, option("--level N", "Run the levels 0 to N.", min=0, max=LAST_LEVEL)]
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
    option("--seed N", "Seed of random shapes and values.", min=0, default="a new one, printed"),
]
Golden = Annotated[
    Path | None,
    option("--golden DIR", "Compare with the golden vectors in DIR.", exists=True, file_okay=False),
]


def command(
    name: Quantizer,
    option: QuantizerOptions = [],
    level: Level = LAST_LEVEL,
    report: ReportFolder = None,
    certified: Certified = False,
    seed: DrawSeed = None,
    golden: Golden = None,
) -> Report:
    """Check that a quantizer keeps its promises, with the conformance kit.

    Without -o it checks every configuration for which the quantizer makes promises. The exit code
    is 1 if a check failed, or if --certified isn't reached. The kit is a package:
    pip install modulora-conformance.

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
        code, found = _run(name, words, report or Path(temporary))
    text = None if report is None else f"report: {report / name}.html"
    return Report(found, text, exit_code=code)


def check_kit(command: str) -> None:
    """Raises MissingExtraError: the conformance kit isn't installed."""
    from modulora_core.errors import MissingExtraError

    if importlib.util.find_spec(KIT) is None:
        raise MissingExtraError(
            f"modulora {command}: expected the conformance kit, which isn't installed; "
            "pip install modulora-conformance"
        )


def _check_request(name: str, option: list[str], level: int, certified: bool) -> None:
    """Refuse a wrong request before the kit's process starts."""
    from modulora_core.errors import OptionError
    from modulora_core.options import parse_options
    from modulora_core.registry import create

    check_kit("conformance")
    create(name, parse_options(option))
    if certified and level < LAST_LEVEL:
        raise OptionError(
            f"--certified: expected all levels, got --level {level}; leave out one of the two"
        )


def _run(name: str, words: list[str], folder: Path) -> tuple[int, dict[str, Any]]:
    """Give the exit code and the result of the kit's process, which prints for itself."""
    from modulora_core.errors import WorkError

    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)  # an earlier run's result must not pass for this run's
    arguments = [sys.executable, "-m", KIT, name, *words, f"--report={folder}"]
    code = subprocess.run(arguments, stdout=_STDERR if terminal().json else None).returncode
    if code not in (PASSED, FAILED) or not file.exists():
        raise WorkError(
            f"conformance of {name}: expected the checks to run, got exit code {code} of pytest "
            f"and {'a' if file.exists() else 'no'} result; its output above says why"
        )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return code, found
