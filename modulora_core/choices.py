"""A quantizer with its options, as somebody asks for it: ``NAME`` or ``NAME:KEY=VALUE,...``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modulora_core import registry
from modulora_core.errors import OptionError
from modulora_core.options import parse_options
from modulora_core.spec import Quantizer


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantizer by name, with options of it; nothing is checked before :meth:`create`."""

    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, subject: str = "choice") -> Choice:
        """Read ``NAME`` or ``NAME:KEY=VALUE,...``. Option values stay strings.

        Args:
            subject: what it was said to, as ``--choices``; the message begins with it.

        Raises:
            OptionError: it is neither, or a key comes twice.
        """
        name, colon, options = text.partition(":")
        if not name or (colon and not options):
            raise OptionError(f"{subject}: expected NAME or NAME:KEY=VALUE,..., got {text!r}")
        return cls(name, parse_options(options.split(",") if options else []))

    @property
    def label(self) -> str:
        """As :meth:`parse` reads it."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.quantizer}:{options}" if options else self.quantizer

    def create(self) -> Quantizer:
        """The quantizer. Raises PluginError where its plugin can't be used, OptionError for wrong options."""
        return registry.create(self.quantizer, self.options)
