"""A quantizer's options: from ``key=value`` words or a mapping to its validated pydantic model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)


def parse_options(words: Iterable[str]) -> dict[str, str]:
    """Turn ``["group_size=64", "symmetric=true"]`` into a mapping. Values stay strings.

    Raises:
        OptionError: a word isn't ``key=value``, or a key comes twice.
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


def validate_options(
    subject: str, model: type[BaseModel], options: Mapping[str, object]
) -> BaseModel:
    """Build ``model`` from ``options``, whose strings are parsed to the fields' types.

    Args:
        subject: whose options they are, for messages: the quantizer's name.
        model: the quantizer's ``Options``.
        options: by field name. Fields that are left out take their defaults. Where a field is a ``Literal`` of numbers, a string that reads
            like one of them is it.

    Raises:
        OptionError: an unknown option (with near misses), or values that the model refuses; one sentence that
            names each option, what was expected and what came.
    """
    return validate_model(f"quantizer {subject!r}", model, options)


def validate_model(subject: str, model: type[Model], values: Mapping[str, object]) -> Model:
    """Build any pydantic model as :func:`validate_options` does; ``subject`` begins the message."""
    unknown = [key for key in values if key not in model.model_fields]
    if unknown:
        raise OptionError(f"{subject}: " + "; ".join(_unknown(key, model) for key in unknown))
    meant = {
        key: _member(value, model.model_fields[key].annotation) for key, value in values.items()
    }
    try:
        return model.model_validate(meant)
    except ValidationError as error:
        problems = "; ".join(
            _invalid(details, model) for details in error.errors(include_url=False)
        )
        raise OptionError(f"{subject}: {problems}") from None


def _member(value: object, annotation: object) -> object:
    """What of a ``Literal`` a word means. pydantic reads numbers and flags from strings, but not there."""
    if not isinstance(value, str):
        return value
    word, members = value.strip().lower(), list(_members(annotation))
    others = (
        member for member in members if not isinstance(member, str) and str(member).lower() == word
    )
    return value if value in members else next(others, value)


def _members(annotation: object) -> Iterator[object]:
    """Of a ``Literal``, or of one among several types."""
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
    if not details[
        "loc"
    ]:  # a check of the whole model, such as of two fields that exclude each other
        return message
    name = ".".join(str(part) for part in details["loc"])
    field = model.model_fields.get(str(details["loc"][0]))
    about = f" ({field.description})" if field is not None and field.description else ""
    if details["type"] == "missing":
        return f"option {name!r}: expected a value, got none{about}"
    return f"option {name!r}: {message}, got {_shown(details['input'])}{about}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
