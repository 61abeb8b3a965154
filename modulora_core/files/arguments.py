"""Check the types of arguments in Python, where no command line has parsed them."""

from __future__ import annotations

import numbers
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from modulora_core.errors import OptionError

_KINDS = MappingProxyType({
    "int": numbers.Integral, "float": numbers.Real, "str": str, "bool": bool, "None": type(None)
})  # fmt: skip
"""Plain types by their names in annotations. NumPy's numbers are numbers too."""


def check_type(name: str, value: object, kind: str) -> None:
    """Refuse a value of another type.

    Args:
        name: the argument.
        value: a bool is no number.
        kind: names of plain types, as in an annotation: ``"int | None"``.

    Raises:
        OptionError: the value has none of these types.
    """
    kinds = kind.split(" | ")
    is_number = not isinstance(value, bool) or "bool" in kinds
    if not (is_number and isinstance(value, tuple(_KINDS[each] for each in kinds))):
        raise OptionError(f"{name}: expected {' or '.join(kinds)}, got {value!r:.80}")


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass that have plain types. Raises OptionError."""
    for each in fields(settings):
        if _KINDS.keys() >= set(str(each.type).split(" | ")):
            check_type(each.name, getattr(settings, each.name), str(each.type))
