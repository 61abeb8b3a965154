"""Make prompts and completions from the columns of any data, by two templates::

    prompt:     "{premise} Does it follow that {hypothesis}?"
    completion: "{label}"

``{name}`` is replaced by the column's text or number, ``{{`` and ``}}`` by a brace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Self

from modulora_core.data.files import Record
from modulora_core.errors import DataError, OptionError


@dataclass(frozen=True, slots=True)
class Template:
    """The templates of a prompt and of its completion. Raises OptionError."""

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            if not _columns(name, getattr(self, name)):
                raise OptionError(
                    f"{name}: expected a template with a column in braces, such as {{text}}, got "
                    f"{getattr(self, name)!r:.60}"
                )

    @classmethod
    def of(cls, prompt: str | None, completion: str | None) -> Self | None:
        """The template of two options; None if neither is given. OptionError if one is missing."""
        if prompt is None and completion is None:
            return None
        if prompt is None or completion is None:
            missing = "prompt" if prompt is None else "completion"
            raise OptionError(f"{missing}: expected prompt and completion together, got one")
        return cls(prompt, completion)

    @property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        return _columns("prompt", self.prompt) + _columns("completion", self.completion)

    def fill(self, records: Sequence[Record]) -> list[Record]:
        """The records with the fields ``prompt`` and ``completion`` alone. Null becomes empty.

        Raises DataError: a column is missing, or isn't text or a number, with the place.
        """
        parts = {name: _columns(name, getattr(self, name)) for name in ("prompt", "completion")}
        return [
            Record(
                {
                    name: getattr(self, name).format(
                        **{column: _text(record, name, column) for column in columns}
                    )
                    for name, columns in parts.items()
                },
                record.place,
            )
            for record in records
        ]


def _columns(name: str, template: str) -> list[str]:
    """The columns in a template, which may be plain names only."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise OptionError(
            f"{name}: expected columns in braces, and {{{{ and }}}} for braces: {error}, in "
            f"{template!r:.60}"
        ) from None
    columns = []
    for _, column, layout, conversion in parts:
        if column is None:
            continue
        if not column or layout or conversion or set(column) & set(".[]") or column.isdigit():
            raise OptionError(
                f"{name}: expected the name of a column in braces, without a layout, got "
                f"{column!r} in {template!r:.60}"
            )
        columns.append(column)
    return columns


def _text(record: Record, name: str, column: str) -> str:
    if column not in record.fields:
        known = ", ".join(map(str, record.fields))[:200]
        raise DataError(f"{record.place}: {name}: expected the column {column!r}, got {known}")
    value: Any = record.fields[column]
    if value is not None and not isinstance(value, str | int | float):
        raise DataError(
            f"{record.place}: {name}: expected text or a number in the column {column!r}, got "
            f"{value!r:.60}"
        )
    return "" if value is None else str(value)
