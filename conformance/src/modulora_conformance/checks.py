"""Defines a check, the checks that it needs, and the guard over subclasses.

A check is a method ``test_*`` of a :class:`Level`. Its docstring says why it fails. ``@needs``
names checks that must pass first, so that one cause gives one failure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple, TypeVar

import pytest

Check = TypeVar("Check", bound=Callable[..., Any])

GUARD = "test_no_check_is_overridden_or_deleted"

PACKS = "test_the_shape_is_kept"
"""Every check above L0 needs this one: without a packed weight there is nothing to check."""

YOURS = frozenset({"quantizer", "golden"})
"""The attributes that a subclass defines. Every other attribute of the kit stays as it is."""


def needs(*names: str) -> Callable[[Check], Check]:
    """Skip the decorated check if one of these failed for the same quantizer. The outermost
    decorator."""

    def mark(check: Check) -> Check:
        check.__conformance_needs__ = names  # type: ignore[attr-defined]
        return check

    return mark


def needed_by(check: Any, level: str) -> tuple[str, ...]:
    """The names given to :func:`needs`, and :data:`PACKS` for a check above L0."""
    names: tuple[str, ...] = getattr(check, "__conformance_needs__", ())
    return (PACKS, *names) if level != "L0" and check.__name__ != PACKS else names


class Level:
    """Groups checks.

    Attributes:
        level: ``"L0"`` to ``"L9"``.
        title: its name. Reports show it with the docstring of the class.
    """

    level: ClassVar[str]
    title: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _threads(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Run a check on one thread, unless its weight is large and it is marked ``threads``.

        In small products on a busy machine, threads wait for each other a hundred times as long.
        A setting that a quantizer changed is set back: the next check is not to blame."""
        from modulora_conformance.changes import kept_settings  # it imports torch
        from modulora_core.dense_products import one_thread

        threads = request.node.get_closest_marker("threads") is not None
        with kept_settings(), nullcontext() if threads else one_thread():
            yield


def checks_of(cls: type) -> Iterator[tuple[str, Any, type[Level]]]:
    """Name, function and level of every check that ``cls`` inherits from the kit, by level."""
    levels = [b for b in cls.__mro__ if issubclass(b, Level) and "level" in vars(b) and _kits(b)]
    for level in sorted(levels, key=lambda base: base.level):
        for name, value in vars(level).items():
            if name.startswith("test_") and callable(value):
                yield name, value, level


def about(cls: type) -> dict[str, dict[str, str]]:
    """``{"title", "text"}`` of each level in ``cls``, for reports."""
    levels: dict[str, type[Level]] = {}
    for _, _, level in checks_of(cls):
        levels.setdefault(level.level, level)
    return {
        name: {"title": level.title, "text": inspect.getdoc(level) or ""}
        for name, level in levels.items()
    }


def meanings(cls: type) -> dict[str, str]:
    """The docstring of each check in ``cls``, by name, for reports."""
    checks = {name: check for name, check, _ in checks_of(cls)} | {GUARD: guard}
    return {name: " ".join((inspect.getdoc(check) or "").split()) for name, check in checks.items()}


class Explained(NamedTuple):
    """One check as ``modulora conformance --list`` shows it."""

    level: str
    check: str
    """Its name says what the check holds true. ``-k`` takes it."""
    fault: str
    """The usual cause of a failure: the first sentence of its docstring."""
    advice: str
    """How to mend it: the other sentences; perhaps none."""


def explained(cls: type) -> list[Explained]:
    """Every check in ``cls`` in one line, by level."""
    return [
        Explained(
            level.level, name.removeprefix("test_"), *explanation(inspect.getdoc(check) or "")
        )
        for name, check, level in checks_of(cls)
    ]


def in_words(name: str) -> str:
    """The name of a check with spaces."""
    return name.removeprefix("test_").replace("_", " ")


def explanation(docstring: str) -> tuple[str, str]:
    """The fault and the advice in a check's docstring, without "If this fails"."""
    text = re.sub("^If this fails[:,] ", "", " ".join(docstring.split()))
    fault, *advice = re.split(r"(?<=\.) (?=[^a-z])", text, maxsplit=1)
    return fault, "".join(advice)


def violations(cls: type) -> list[str]:
    """Names of the kit that a subclass overrides or deletes, without a strict xfail and its
    reason."""
    kit = {name for base in cls.__mro__ if _kits(base) for name in vars(base)}
    replaced = {name for name in kit if not name.startswith("__")} - YOURS
    return [
        f"{base.__name__}.{name}"
        for base in cls.__mro__
        if not _kits(base) and base is not object
        for name, value in vars(base).items()
        if name in replaced and not (name.startswith("test_") and _is_expected_to_fail(value))
    ]


def _kits(cls: type) -> bool:
    module = cls.__module__
    return module.startswith("modulora_conformance.") and not module.endswith(".test_conformance")


def _is_expected_to_fail(value: Any) -> bool:
    marks = [mark for mark in getattr(value, "pytestmark", []) if mark.name == "xfail"]
    return inspect.isfunction(value) and any(
        mark.kwargs.get("strict") is True and str(mark.kwargs.get("reason", "")).strip()
        for mark in marks
    )


def guard(self: Any, quantizer: Any) -> None:  # noqa: ARG001  # the result belongs to its quantizer
    """If this fails: a subclass overrides or deletes a check, so that a pass proves nothing.

    Mark a check that cannot pass with ``@pytest.mark.xfail(strict=True, reason="why")`` and call
    ``super()`` in its body.
    """
    if taken := violations(type(self)):
        pytest.fail(
            f"expected every check of the kit, got {', '.join(taken)} instead; "
            'mark it @pytest.mark.xfail(strict=True, reason="...") or remove it',
            pytrace=False,
        )
