"""The three hooks that a plugin may implement, and the facts that the last two give.

    modulora_quantizers    quantizers, each a :class:`~modulora_core.spec.QuantizerSpec`
    modulora_formats       checkpoints and files of other tools, each a :class:`FormatSpec`
    modulora_commands      commands of ``modulora``, each a :class:`CommandSpec`

A plugin is a package with an entry point in the group ``modulora``, which names a module::

    from modulora_core.hookspecs import CommandSpec, hookimpl

    @hookimpl
    def modulora_commands():
        return [
            CommandSpec(
                name="weigh", summary="Weigh a model.", panel="Use",
                location="modulora_mine.weigh:command", protocol=2,
            )
        ]

Hooks run on every ``modulora`` command. Import nothing heavy in that module: torch takes seconds.
"""

from __future__ import annotations

from typing import Annotated

import pluggy
from pydantic import AfterValidator, StringConstraints

from modulora_core.spec import Location, Name, PluginSpec, QuantizerSpec

__all__ = [
    "PROJECT", "CommandSpec", "FormatSpec", "hookimpl", "modulora_commands", "modulora_formats",
    "modulora_quantizers",
]  # fmt: skip

PROJECT = "modulora"
"""The name of pluggy's project and of the entry-point group."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""The keys in config.json that say how a model is quantized; the second is an older one."""


def _free(name: str) -> str:
    if name in (*QUANTIZATION_KEYS, "text_config", "config.json"):
        raise ValueError("expected a name that transformers does not use")
    return name


_FormatName = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9]*([-_][a-z0-9]+)*$")]
_Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$"), AfterValidator(_free)]
_JsonFile = Annotated[str, StringConstraints(pattern=r"^[^/\\]+\.json$"), AfterValidator(_free)]


class FormatSpec(PluginSpec):
    """A checkpoint format of another tool that a plugin reads or writes.

    Raises ValueError: a field is malformed; the message names it.
    """

    name: _FormatName
    """The name that users give (``modulora convert --to NAME``): lower case letters, digits,
    hyphens, underscores."""
    location: Location
    """``"package.module:Class"`` of its :class:`~modulora_core.models.formats.CheckpointFormat`.
    Formats may share a class, which is constructed with the spec."""
    adapters: bool = False
    """Whether folders of this format hold an adapter, and no model. ``location`` names an
    ``AdapterWriter`` then."""
    quant_methods: tuple[str, ...] = ()
    """Values of ``quant_method`` in config.json's ``quantization_config`` that mark a folder of
    this format. A format without these and without ``config_keys`` is only written."""
    quant_flags: tuple[_Key, ...] = ()
    """Keys of that config; one of them must be true. For a method that several formats share."""
    quant_formats: tuple[str, ...] = ()
    """Values of that config's ``format``; it must have one of them. For such a method too."""
    config_keys: tuple[_Key, ...] = ()
    """Keys of config.json that mark a folder of this format if one is not empty, for tools that
    write no ``quantization_config``. The model's config does not keep them."""
    config_files: tuple[_JsonFile, ...] = ()
    """Files with the quantization config of folders whose config.json has none; written too."""
    file_suffix: str = ""
    """The suffix of files that hold a whole model. ``location`` names a ``ModelFile`` then."""
    file_magic: str = ""
    """The first bytes of such files, in ASCII, which tell the format of a file without suffix."""
    writer: Location | None = None
    """The class that writes such files, a ``FileWriter``, if they are written."""


class CommandSpec(PluginSpec):
    """A command of ``modulora``. Raises ValueError: a field is malformed; the message names it."""

    name: Name
    """The word after ``modulora``: lower case letters, digits, single hyphens."""
    summary: str
    """One line of ``modulora --help``."""
    location: Location
    """``"package.module:function"``, imported when the command runs. :mod:`modulora_core.cli` says
    how to write the function."""
    panel: str
    """The title of its panel in ``modulora --help``: ``"Start"``, ``"Quantize"``, ``"Train"``,
    ``"Use"``, ``"Plugins"``, or another one, which comes after them."""


hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def modulora_quantizers() -> list[QuantizerSpec]:  # type: ignore[empty-body]  # a hookspec
    """Return the quantizers of this package."""


@hookspec
def modulora_formats() -> list[FormatSpec]:  # type: ignore[empty-body]  # a hookspec
    """Return the formats of this package: folders and files of other tools."""


@hookspec
def modulora_commands() -> list[CommandSpec]:  # type: ignore[empty-body]  # a hookspec
    """Return the commands of this package."""
