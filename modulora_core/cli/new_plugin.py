"""``modulora new-plugin``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from modulora_core.cli.terminal import Report

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", show_default=False, help="The quantizer's name: lower case letters, digits and single "
                   "hyphens."),
]  # fmt: skip
Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", show_default=False, help="The folder to write; new or empty."),
]


def command(name: Name, folder: Folder) -> Report:
    """Write a package with a working quantizer in it, to start a plugin from.

    It installs, registers and passes the whole conformance kit as it stands: a simple quantizer, its reference, tests, a CI
    workflow and a README. Comments in quantizer.py show where to put one's own.

    Examples:
      modulora new-plugin my-rounding my-plugin
      modulora new-plugin my-rounding my-plugin --json
    """
    from modulora_core.cli.scaffold import new_plugin

    written = new_plugin(name, folder)
    text = (f"{folder}: the quantizer {name} in {len(written.files)} files; begin in src/{written.module}/quantizer.py\n"
            f"next:\n{_commands(name, folder)}")  # fmt: skip
    return Report(written.to_json(), text)


def _commands(name: str, folder: Path) -> str:
    here = (
        folder if folder.is_absolute() else f"./{folder}"
    )  # else pip takes it for a package's name
    commands = (
        f"pip install -e {shlex.quote(f'{here}[test]')}",
        f"pytest {shlex.quote(str(folder))}",
        f"modulora conformance {name} --certified",
    )
    return "\n".join(f"  {command}" for command in commands)
