"""Which quantizer, with which options, the command line asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modulora_core.options import parse_options
from modulora_core.registry import find
from modulora_core.spec import titled


@dataclass(frozen=True, slots=True)
class Configuration:
    """A quantizer's name and options: one run of all the checks."""

    name: str
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The options in one line, as a test's id shows them."""
        return titled(self.options)


def configurations(name: str, options: list[str]) -> list[Configuration]:
    """With ``options`` (``key=value``) just those; else those that the spec makes promises for, or the defaults.

    Raises:
        PluginError: the quantizer isn't installed, or its plugin can't be used.
        OptionError: an option is malformed.
    """
    entry = find(name)
    if options:
        return [Configuration(name, parse_options(options))]
    promises = entry.spec.promises if entry.spec is not None else ()
    return [Configuration(name, promise.options) for promise in promises] or [
        Configuration(name, {})
    ]
