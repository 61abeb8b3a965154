"""``modulora new-plugin``. It fills in the templates of ``templates/plugin``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template
from typing import Annotated

from modulora_core.cli.arguments import argument
from modulora_core.cli.terminal import Report
from modulora_core.errors import DuplicatePluginError, OptionError

TEMPLATES = Path(__file__).parents[1] / "templates" / "plugin"

SUFFIX = ".tmpl"
"""The end of a template's file name, so that no tool reads the template as code."""

NAME_IN_PATHS = "NAME"
"""The part of a template's path that becomes the quantizer's name."""

PluginName = Annotated[
    str, argument("NAME", "The quantizer's name: lower case letters, digits, single hyphens.")
]
Folder = Annotated[Path, argument("DIR", "The folder to write; new or empty.")]


def command(name: PluginName, folder: Folder) -> Report:
    """Write a plugin package with a working quantizer, to start your own from.

    The package installs and passes the whole conformance kit unchanged. It has a simple quantizer
    with its reference, tests, a CI workflow and a README. Comments in quantizer.py mark the parts
    to replace.

    Examples:
        modulora new-plugin my-rounding my-plugin
        modulora new-plugin my-rounding my-plugin --json
    """
    files = new_plugin(name, folder)
    here = folder if folder.is_absolute() else f"./{folder}"  # pip takes "x" for a package's name
    text = (
        f"{folder}: the quantizer {name} in {len(files)} files\n"
        f"Begin in {folder / 'src' / _module(name) / 'quantizer.py'}\n\n"
        f"Next: pip install -e {shlex.quote(f'{here}[test]')}\n"
        f"then: pytest {shlex.quote(str(folder))}\n"
        f"then: modulora conformance {name} --certified"
    )
    return Report({"out": str(folder), "quantizer": name, "files": files}, text)


def new_plugin(name: str, out: Path) -> list[str]:
    """Write the package ``modulora-NAME`` to ``out``, and return its files, sorted.

    Args:
        name: lower case letters, digits and single hyphens, such as ``"my-rounding"``.
        out: a folder that is new or empty. It appears complete or not at all.

    Raises:
        OptionError: the name is malformed.
        DuplicatePluginError: a quantizer or a module of that name is installed.
        OutputError: ``out`` has files, or can't be written.
    """
    from modulora_core.checkpoints.outputs import whole_or_nothing

    _check_name(name)
    _check_free(name)
    words = {
        "name": name,
        "under": name.replace("-", "_"),
        "module": _module(name),
        "title": "".join(part.capitalize() for part in name.split("-")),
        "core": _core(),
    }
    files = []
    with whole_or_nothing(out) as folder:
        for template in TEMPLATES.rglob(f"*{SUFFIX}"):
            path = template.relative_to(TEMPLATES).as_posix().removesuffix(SUFFIX)
            path = path.replace(NAME_IN_PATHS, words["under"])
            text = Template(template.read_text("utf-8")).substitute(words)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, "utf-8")
            files.append(path)
    return sorted(files)


def _module(name: str) -> str:
    """Give the package's module. The prefix keeps it clear of Python's keywords."""
    return f"modulora_{name.replace('-', '_')}"


def _check_name(name: str) -> None:
    from modulora_core.spec import QUANTIZER_NAME

    if not re.fullmatch(QUANTIZER_NAME, name):
        raise OptionError(
            "name of a quantizer: expected a lower case letter first, then lower case letters, "
            f"digits and single hyphens, such as 'my-rounding', got {name!r}"
        )


def _check_free(name: str) -> None:
    from importlib.util import find_spec

    from modulora_core.registry import entries

    taken = [entry.origin for entry in entries() if entry.name == name]
    if not taken and find_spec(_module(name)) is not None:
        taken = [f"the installed package {_module(name)}"]
    if taken:
        raise DuplicatePluginError(
            f"quantizer {name!r}: expected a free name, got the name of {taken[0]}; "
            "choose another, or uninstall it"
        )


def _core() -> str:
    """Give this core's major and minor version, the least that the new package asks for."""
    from modulora_core.version import VERSION

    found = re.match(r"\d+\.\d+", VERSION)
    return found[0] if found else "0.1"
