"""What is known of a foreign checkpoint format without importing torch: part of the contract, see :mod:`modulora_core.spec`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

LOCATION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""Where a class is: ``"package.module:Class"``."""

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_OUR_KEYS = ("quantization_config", "compression_config", "text_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """A checkpoint format of other tools that a quantizer's plugin reads or writes.

    Attributes:
        name: how users ask for it (``modulora convert --to NAME``): lower case letters, digits, hyphens, underscores.
        summary: one line.
        location: where its :class:`~modulora_core.formats.CheckpointFormat` is: ``"package.module:Class"``.
            Several formats may share a class, which is constructed with the spec.
        quant_methods: the ``quant_method`` of config.json's ``quantization_config`` by which a folder of this format
            is known. Without these and ``config_keys`` a format is only written.
        config_keys: keys of config.json by any of which, its value not being empty, a folder of this format is known: for tools
            that don't write a ``quantization_config``. They aren't kept in the config of the model.
        config_files: names of files that hold that config where config.json has none, such as older tools wrote.
            They are written too.

    Raises:
        ValueError: a field is malformed; the message names it.
    """

    name: str
    summary: str
    location: str
    quant_methods: tuple[str, ...] = ()
    config_keys: tuple[str, ...] = ()
    config_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise ValueError(
                f"name of a format: expected lower case letters, digits, single hyphens or underscores, got {self.name!r}"
            )
        if not (isinstance(self.location, str) and LOCATION.fullmatch(self.location)):
            raise ValueError(
                f"location of format {self.name}: expected 'package.module:Class', got {self.location!r}"
            )
        for key in self.config_keys:
            if not (isinstance(key, str) and key.isidentifier()) or key in _OUR_KEYS:
                raise ValueError(f"config_keys of format {self.name}: expected names of fields of config.json, other than "
                                 f"{', '.join(_OUR_KEYS)}, got {key!r}")  # fmt: skip
        for file in self.config_files:
            if PurePath(file).name != file or not file.endswith(".json") or file == "config.json":
                raise ValueError(
                    f"config_files of format {self.name}: expected names of .json files beside config.json, got {file!r}"
                )
