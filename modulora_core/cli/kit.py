"""The conformance kit, a package of its own that some commands need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

NAME = "modulora_conformance"


def check_kit(command: str) -> None:
    """Raises MissingExtraError: the kit isn't installed."""
    from modulora_core.errors import MissingExtraError

    if importlib.util.find_spec(NAME) is None:
        raise MissingExtraError(
            f"modulora {command}: expected the conformance kit, which isn't installed: pip install modulora-conformance"
        )


def import_kit(command: str, module: str) -> Any:
    """A module of the kit. Raises MissingExtraError: the kit isn't installed."""
    check_kit(command)
    return importlib.import_module(f"{NAME}.{module}")
