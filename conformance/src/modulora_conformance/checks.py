"""What a check is, what it needs, and the guard over the subclasses.

A check is a method ``test_*`` of a :class:`Level`. Its docstring says what it means when it fails. ``@needs`` names checks that
must have passed before: of a chain of failures with one cause only the first is told.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import pytest

Check = TypeVar("Check", bound=Callable[..., Any])

PACKS = "test_the_shape_is_kept"
"""What every check of a level above L0 needs: where nothing can be packed, nothing else can be said."""

YOURS = frozenset({"quantizer", "golden"})
"""What a subclass gives. Whatever else it takes from the kit stays as it is."""


def needs(*names: str) -> Callable[[Check], Check]:
    """Mark a check that says nothing new where one of these checks of the same quantizer has failed."""

    def mark(check: Check) -> Check:
        check.__conformance_needs__ = names  # type: ignore[attr-defined]
        return check

    return mark


def needed_by(check: Any, level: str) -> tuple[str, ...]:
    """The names that :func:`needs` was given, and :data:`PACKS` for a check of a ``level`` above L0."""
    tested = getattr(
        getattr(check, "hypothesis", None), "inner_test", check
    )  # what Hypothesis wrapped
    names: tuple[str, ...] = getattr(tested, "__conformance_needs__", ())
    packs = level != "L0" and check.__name__ != PACKS
    return (PACKS, *names) if packs else names


class Level:
    """A named set of checks.

    Attributes:
        level: ``"L0"`` to ``"L7"``; title: what it is about.
    """

    level: ClassVar[str]
    title: ClassVar[str]


def checks_of(cls: type) -> Iterator[tuple[str, Any, type[Level]]]:
    """Name, function and level of every check that the kit gives to ``cls``, in order of the levels."""
    levels = [
        base
        for base in cls.__mro__
        if issubclass(base, Level) and "level" in vars(base) and _is_of_the_kit(base)
    ]
    for level in sorted(levels, key=lambda base: base.level):
        for name, value in vars(level).items():
            if name.startswith("test_") and callable(value):
                yield name, value, level


def violations(cls: type) -> list[str]:
    """What a subclass took away from the kit: checks and helpers that it overrides or deletes.

    An overridden check that carries ``pytest.mark.xfail(strict=True, reason="...")`` is told as an expected failure and isn't
    among them.
    """
    kit = {
        name
        for base in cls.__mro__
        if _is_of_the_kit(base)
        for name in vars(base)
        if not name.startswith("__")
    }
    found = []
    for base in cls.__mro__:
        if _is_of_the_kit(base) or base is object:
            continue
        for name, value in vars(base).items():
            if name in kit - YOURS and not (
                name.startswith("test_") and _is_expected_to_fail(value)
            ):
                found.append(f"{base.__name__}.{name}")
    return found


def _is_of_the_kit(cls: type) -> bool:
    return (
        cls.__module__.startswith("modulora_conformance.")
        and cls.__module__ != "modulora_conformance.test_conformance"
    )


def _is_expected_to_fail(value: Any) -> bool:
    marks = [mark for mark in getattr(value, "pytestmark", []) if mark.name == "xfail"]
    return inspect.isfunction(value) and any(
        mark.kwargs.get("strict") is True and str(mark.kwargs.get("reason", "")).strip()
        for mark in marks
    )


def guard(self: Any, quantizer: Any) -> None:  # noqa: ARG001  # whose result this belongs to
    """If this fails: a subclass overrides or deletes a check, so that passing means nothing. Mark one that can't hold with
    ``@pytest.mark.xfail(strict=True, reason="why")``, calling ``super()`` in its body.
    """
    taken = violations(type(self))
    if taken:
        pytest.fail(f"expected every check of the kit, got {', '.join(taken)} in its place; "
                    'mark it @pytest.mark.xfail(strict=True, reason="...") or remove it', pytrace=False)  # fmt: skip
