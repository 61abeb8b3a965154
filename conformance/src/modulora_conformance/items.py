"""What a test of pytest is to the kit: a check of a class, its level, its case, its quantizer."""

from __future__ import annotations

from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from modulora_conformance.checks import GUARD, Level, checks_of


def golden_of(item: pytest.Item) -> Path | None:
    """The folder of golden vectors that an item's class or the command line names."""
    named: Path | None = getattr(class_of(item), "golden", None)
    return named or item.config.getoption("--golden")


def class_of(item: pytest.Item) -> Any:
    return getattr(item, "cls", None)


def name_of(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", None) or item.name)


def is_check(item: pytest.Item) -> bool:
    cls = class_of(item)
    return cls is not None and issubclass(cls, Level) and name_of(item) in levels_of(cls)


@cache
def levels_of(cls: type) -> dict[str, str]:
    """The level of each check, in the order of the checks."""
    return {GUARD: "L0"} | {name: level.level for name, _, level in checks_of(cls)}


def level_of(item: pytest.Item) -> str:
    return levels_of(class_of(item))[name_of(item)]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return dict(callspec.params) if callspec is not None else {}


def _own(item: pytest.Item) -> set[str]:
    """The parameters that are a check's own cases. All others choose the quantizer."""
    marks = getattr(getattr(class_of(item), name_of(item)), "pytestmark", [])
    given = [mark.args[0] for mark in marks if mark.name == "parametrize"]
    lists = [names.split(",") if isinstance(names, str) else names for names in given]
    return {name.strip() for names in lists for name in names}


def key_of(item: pytest.Item) -> tuple[str, str]:
    """Identifies a class and the quantizer of its fixture."""
    parent = item.nodeid.split("::" + item.name)[0]
    own = _own(item)
    chosen = {name: value for name, value in _parameters(item).items() if name not in own}
    return parent, repr(sorted(chosen.items(), key=itemgetter(0)))


def case_of(item: pytest.Item) -> str:
    own = _own(item)
    cases = [value for name, value in _parameters(item).items() if name in own]
    words = [getattr(value, "__name__", str(value)) for value in cases]  # of a class, or a value
    return ", ".join(word.removeprefix("torch.") for word in words)
