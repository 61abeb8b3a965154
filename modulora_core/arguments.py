"""Check the types of arguments in Python, where no command line has parsed them.

pydantic's ``validate_call`` is not used: in strict mode it refuses NumPy's integers, and without it
takes ``"3"`` for 3.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import numbers
import reprlib
import sys
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import MappingProxyType, NoneType, UnionType
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from modulora_core.errors import OptionError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Class = TypeVar("Class")

_KINDS: MappingProxyType[Any, type] = MappingProxyType(
    {int: numbers.Integral, float: numbers.Real, None: NoneType}
)
"""NumPy's numbers are numbers too."""


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a public function or method: arguments must have the types of its annotations.

    Another type raises OptionError. A class that is imported for type checkers alone isn't checked.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        kinds = _annotations(function)
        for name, value in signature.bind(*arguments, **keywords).arguments.items():
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                _check(name, value, kinds.get(name, Any))
        return function(*arguments, **keywords)

    return call


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def checked_dataclass(cls: type[Class] | None = None, *, eq: bool = True) -> Any:
    """Decorate a class: a frozen dataclass whose fields must have the types of its annotations.

    A field of another type raises OptionError.

    Args:
        cls: the class.
        eq: equal fields make equal values; else a value equals itself alone, and is hashable.
    """
    if cls is None:
        return functools.partial(checked_dataclass, eq=eq)
    made = dataclass(frozen=True, slots=True, weakref_slot=True, eq=eq)(cls)
    made.__init__ = checked(made.__init__)  # type: ignore[method-assign]
    return made


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass. Raises OptionError: a field has another type."""
    kinds = _annotations(settings.__class__)
    for each in fields(settings):
        if each.init:
            _check(each.name, getattr(settings, each.name), kinds[each.name])


@functools.lru_cache(maxsize=256)
def _annotations(annotated: Any) -> dict[str, Any]:
    module = inspect.getmodule(annotated)
    return get_type_hints(annotated, localns=_Names(vars(builtins) | vars(module)))


class _Names(dict[str, Any]):
    """Names of a module. A name that it imports for type checkers alone is torch's, or Any."""

    def __missing__(self, name: str) -> Any:
        torch = sys.modules.get("torch")
        return {"torch": torch, "Tensor": getattr(torch, "Tensor", None)}.get(name) or Any


def _check(name: str, value: object, kind: Any) -> None:
    if not _has_type(value, kind):
        raise OptionError(f"{name}: expected {_words(kind)}, got {reprlib.repr(value)}")


def _has_type(value: Any, kind: Any) -> bool:
    if kind in (Any, object, type(value)) or isinstance(kind, TypeVar):
        return True
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or (isinstance(value, str) and value == part) for part in parts)
    plain = _KINDS.get(kind, origin or kind)
    if isinstance(value, bool) or not isinstance(value, plain):
        return isinstance(value, bool) and plain is bool  # a bool is no number
    if plain is abc.Sequence:
        return not isinstance(value, str) and all(_has_type(each, parts[0]) for each in value)
    if plain is abc.Mapping and parts:
        return all(all(map(_has_type, item, parts)) for item in value.items())
    if plain is tuple and parts:
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    return True


def _words(kind: Any) -> str:
    """A type in a message: ``int or None``, ``a list of str``, ``one of fast, best``."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        # words are offered without None: it is no word, and who wants it leaves the argument out
        has_words = any(get_origin(part) is Literal for part in parts)
        return " or ".join(_words(part) for part in parts if not (has_words and part is NoneType))
    if origin is Literal:
        words = [str(part) for part in parts]
        return " or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}"
    if origin is abc.Sequence:
        return f"a list of {_words(parts[0])}"
    if origin is abc.Mapping:
        return f"a mapping of {' to '.join(map(_words, parts))}"
    if origin is tuple:
        return f"a tuple of {' and '.join(_words(part) for part in parts if part is not ...)}"
    return "None" if kind is NoneType else str(getattr(origin or kind, "__name__", kind))
