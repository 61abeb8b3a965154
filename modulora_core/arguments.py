"""Let pydantic check the types of arguments in Python, where no command line has parsed them.

A string is no number, and a bool is none: the checks are pydantic's strict ones.
"""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from modulora_core.errors import OptionError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Class = TypeVar("Class", bound=type)

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a public function or method: arguments must have the types of its annotations.

    Another type raises OptionError. The function gets the arguments themselves, not copies.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        given = signature.bind(*arguments, **keywords).arguments
        try:
            taken = _validator(function)(*arguments, **keywords)
        except ValidationError as error:
            place = error.errors()[0]["loc"][0]
            name = place if isinstance(place, str) else [*signature.parameters][place]
            got = reprlib.repr(given[name])
            raise OptionError(f"{name}: {_expected(error, place)}, got {got}") from None
        for name, value in given.items():  # pydantic makes an instance of a dictionary
            if isinstance(value, dict) and not isinstance(taken[name], Mapping):
                kind, got = type(taken[name]).__name__, reprlib.repr(value)
                raise OptionError(f"{name}: expected an instance of {kind}, got {got}")
        return function(*arguments, **keywords)

    return call


def checked_class(cls: Class) -> Class:
    """Decorate a dataclass: its fields must have the types of their annotations."""
    cls.__init__ = checked(cls.__init__)  # type: ignore[misc]
    return cls


@functools.cache
def _validator(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the same arguments, checks them, and returns them by name."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def named(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        return signature.bind(*arguments, **keywords).arguments

    return validate_call(config=_STRICT)(named)


def _expected(error: ValidationError, place: int | str) -> str:
    """The types that one argument may have, in pydantic's words."""
    words = [each["msg"] for each in error.errors() if each["loc"][0] == place]
    prefix = "Input should be "
    kinds = dict.fromkeys(w.removeprefix(prefix) for w in words if w.startswith(prefix))
    said = f"expected {' or '.join(kinds)}" if kinds else words[0]
    return re.sub(r"a (valid )?dictionary or (an )?instance", "an instance", said)
