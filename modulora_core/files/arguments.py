"""Check the types of arguments in Python, where no command line has parsed them."""

from __future__ import annotations

import builtins
import functools
import inspect
import numbers
import reprlib
from collections import abc
from collections.abc import Callable
from dataclasses import fields
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from modulora_core.errors import OptionError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_KINDS: MappingProxyType[Any, type] = MappingProxyType(
    {int: numbers.Integral, float: numbers.Real, None: NoneType}
)
"""NumPy's numbers are numbers too."""


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a public function or method: arguments must have the types of its annotations.

    An argument of another type raises OptionError. A class that the module imports for type
    checkers alone isn't checked.
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
    """Names of a module; a name that it imports for type checkers alone is Any."""

    def __missing__(self, name: str) -> Any:
        return Any


def _check(name: str, value: object, kind: Any) -> None:
    if not _has_type(value, kind):
        raise OptionError(f"{name}: expected {_words(kind)}, got {reprlib.repr(value)}")


def _has_type(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if origin in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or (isinstance(value, str) and value == part) for part in parts)
    plain = _KINDS.get(kind, origin or kind)
    if isinstance(value, bool) or not isinstance(value, plain):
        return isinstance(value, bool) and plain is bool  # a bool is no number
    if plain is abc.Sequence:
        return not isinstance(value, str) and all(_has_type(each, parts[0]) for each in value)
    return True


def _words(kind: Any) -> str:
    """A type in a message: ``int or None``, ``a list of str``."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is abc.Sequence:
        return f"a list of {_words(parts[0])}"
    return "None" if kind is NoneType else str(getattr(origin or kind, "__name__", kind))
