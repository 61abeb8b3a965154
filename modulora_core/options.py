"""A quantizer's options: from ``key=value`` words or a mapping to a validated pydantic model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)


def parse_options(words: Iterable[str]) -> dict[str, str]:
    """Turn ``["group_size=64", "symmetric=true"]`` into a mapping; values stay strings.

    Raises OptionError: a word is not ``key=value``, or a key comes twice.
    """
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip()
        if not (equals and key):
            raise OptionError(f"quantizer option: expected key=value, got {word!r}")
        if key in options:
            raise OptionError(
                f"quantizer option {key!r}: expected once, got {options[key]!r} and {value!r}"
            )
        options[key] = value
    return options


def validate_model(
    subject: str,
    model: type[Model],
    values: Mapping[str, object],
    validate: Callable[[Any], Model] | None = None,
) -> Model:
    """Build a pydantic model from values by field name; strings are parsed to the fields' types.

    A field that is a ``Literal`` of numbers takes the string of such a number.

    Args:
        values: the fields that differ from their defaults.
        validate: makes the object; by default ``model.model_validate``.

    Raises OptionError.
    """
    unknown = [key for key in values if key not in model.model_fields]
    if unknown:
        raise OptionError(f"{subject}: " + "; ".join(_unknown(key, model) for key in unknown))
    parsed = {
        key: _literal(value, model.model_fields[key].annotation) for key, value in values.items()
    }
    try:
        return (validate or model.model_validate)(parsed)
    except ValidationError as error:
        problems = [_invalid(details, model) for details in error.errors(include_url=False)]
        raise OptionError(f"{subject}: {'; '.join(problems)}") from None


def _literal(value: object, annotation: object) -> object:
    """The member of a ``Literal`` that a string spells. pydantic parses strings only elsewhere."""
    members = list(_members(annotation))
    if not isinstance(value, str) or value in members:
        return value
    word = value.strip().lower()
    spelled = (m for m in members if not isinstance(m, str) and str(m).lower() == word)
    return next(spelled, value)


def _members(annotation: object) -> Iterator[object]:
    """The members of each ``Literal`` in a type or a union of types."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for each in get_args(annotation):
            yield from _members(each)


def _unknown(key: str, model: type[BaseModel]) -> str:
    names = list(model.model_fields)
    near = difflib.get_close_matches(key, names)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    offered = f"expected one of {', '.join(names)}" if names else "it takes no options"
    return f"unknown option {key!r}{hint} ({offered})"


def _invalid(details: ErrorDetails, model: type[BaseModel]) -> str:
    message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should be", "expected", 1)
    message = message.partition(", unable to parse")[0]  # the value itself follows
    if not details["loc"]:  # a check of several fields
        return message
    name = ".".join(str(part) for part in details["loc"])
    field = model.model_fields.get(str(details["loc"][0]))
    about = f" ({field.description})" if field is not None and field.description else ""
    if details["type"] == "missing":
        return f"option {name!r}: expected a value, got none{about}"
    got = repr(details["input"])
    got = got if len(got) <= 60 else got[:57] + "..."
    return f"option {name!r}: {message}, got {got}{about}"


def in_one_line(error: Exception) -> str:
    """An error in one line; of pydantic's the first field that it refused."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors(include_url=False)[0]
    expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    expected = expected.partition(" or instance")[0]  # of a class of ours
    field = "".join(f"{part}: " for part in first["loc"])
    ours = first["type"] == "value_error" and not field  # a check of the whole, with its own words
    return f"{field}{expected}" + ("" if ours else f", got {first['input']!r:.60}")
