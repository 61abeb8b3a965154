"""A plugin package to start from: written from templates, it installs and passes the conformance kit as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template

from modulora_core.checkpoints.outputs import whole_or_nothing
from modulora_core.errors import DuplicatePluginError, OptionError
from modulora_core.registry import entries
from modulora_core.spec import QUANTIZER_NAME

__all__ = ["NewPlugin", "new_plugin"]

SUFFIX = ".tmpl"
"""Of a template's file name, so that no tool takes it for what it becomes."""

NAME_IN_PATHS = "NAME"
"""In a template's path it stands for :attr:`PluginNames.under`."""


@dataclass(frozen=True, slots=True)
class PluginNames:
    """A quantizer's name in the spellings that a package needs.

    Attributes:
        name: as users ask for it: ``"my-rounding"``.

    Raises:
        OptionError: ``name`` is no quantizer's name.
    """

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(QUANTIZER_NAME, self.name):
            raise OptionError(
                f"name of a quantizer: expected a lower case letter first, then lower case letters, digits and single hyphens, "
                f"such as 'my-rounding', got {self.name!r}"
            )

    @property
    def distribution(self) -> str:
        """The package's name on an index: ``"modulora-my-rounding"``."""
        return f"modulora-{self.name}"

    @property
    def under(self) -> str:
        """``"my_rounding"``."""
        return self.name.replace("-", "_")

    @property
    def module(self) -> str:
        """``"modulora_my_rounding"``. The prefix keeps every name clear of Python's keywords."""
        return f"modulora_{self.under}"

    @property
    def title(self) -> str:
        """``"MyRounding"``, in the names of classes."""
        return "".join(part.capitalize() for part in self.name.split("-"))

    def substitutions(self) -> dict[str, str]:
        """What a template's ``$name`` and others become."""
        return {
            "name": self.name,
            "under": self.under,
            "module": self.module,
            "title": self.title,
            "core": _core(),
        }


@dataclass(frozen=True, slots=True)
class NewPlugin:
    """What was written.

    Attributes:
        out: the folder; quantizer: its name; module: of the package; files: their paths in the folder, sorted.
    """

    out: Path
    quantizer: str
    module: str
    files: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {"out": str(self.out), "quantizer": self.quantizer, "files": list(self.files)}


def new_plugin(name: str, out: Path) -> NewPlugin:
    """Write a package with a simple working quantizer, its tests and its CI to ``out``.

    Args:
        name: the quantizer's: lower case letters, digits and single hyphens. The package is ``modulora-NAME``.
        out: a folder that is new or empty. It appears whole or not at all.

    Raises:
        OptionError: the name is malformed.
        DuplicatePluginError: a quantizer or a package of that name is installed.
        OutputError: ``out`` holds something, or can't be written.
    """
    names = PluginNames(name)
    _check_free(names)
    substitutions = names.substitutions()
    written = []
    with whole_or_nothing(out) as folder:
        for path, template in _templates():
            target = path.removesuffix(SUFFIX).replace(NAME_IN_PATHS, names.under)
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_text(Template(template).substitute(substitutions), "utf-8")
            written.append(target)
    return NewPlugin(out, name, names.module, tuple(sorted(written)))


def _check_free(names: PluginNames) -> None:
    taken = [entry.origin for entry in entries() if entry.name == names.name]
    if (
        not taken and find_spec(names.module) is not None
    ):  # also a package of this project that is no quantizer
        taken = [f"the installed package {names.module}"]
    if taken:
        raise DuplicatePluginError(
            f"quantizer {names.name!r}: expected a name that is free, got one that {taken[0]} has; choose another, or uninstall it"
        )


def _templates() -> Iterator[tuple[str, str]]:
    """Path and text of each template."""
    yield from _walk(files("modulora_core.cli") / "templates" / "plugin", "")


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        path = f"{prefix}{item.name}"
        if item.is_dir():
            yield from _walk(item, f"{path}/")
        elif path.endswith(SUFFIX):
            yield path, item.read_text("utf-8")


def _core() -> str:
    """The version that the new package asks for at least: major and minor of this core."""
    from modulora_core import __version__

    found = re.match(r"\d+\.\d+", __version__)
    return found[0] if found else "0.1"
