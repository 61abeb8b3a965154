"""Options as words of a command line, and what a model makes of them. What a plugin's model refuses is in test_registry.py."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel

from modulora_core.errors import OptionError
from modulora_core.options import parse_options, validate_options


class Choices(BaseModel):
    bits: Literal[2, 3, 4] = 4
    fraction: Literal[0.5, "all"] | None = None
    word: Literal["2", "x"] = "x"
    flag: Literal[True] | int = 0


def test_parse_options_keeps_everything_after_the_first_equals_sign() -> None:
    assert parse_options(["a=1", "b=x=y", "c=", " d =e"]) == {
        "a": "1",
        "b": "x=y",
        "c": "",
        "d": "e",
    }


@pytest.mark.parametrize("words", [["group_size"], ["=64"], ["group_size 64"], ["a=1", "a=2"]])
def test_parse_options_refuses_what_is_not_one_value_for_one_key(words: list[str]) -> None:
    with pytest.raises(OptionError, match="expected"):
        parse_options(words)


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["bits=3"], {"bits": 3}), (["bits= 2 "], {"bits": 2}), (["fraction=0.5"], {"fraction": 0.5}),
     (["fraction=all"], {"fraction": "all"}), (["word=2"], {"word": "2"}), (["flag=true"], {"flag": True}), (["flag=7"], {"flag": 7})],
)  # fmt: skip
def test_a_word_is_read_as_the_number_of_a_literal(
    words: list[str], meant: dict[str, object]
) -> None:
    read = validate_options("alpha", Choices, parse_options(words)).model_dump()
    expected = Choices(**meant).model_dump()
    assert read == expected
    assert [type(value) for value in read.values()] == [type(value) for value in expected.values()]


def test_a_word_that_is_none_of_a_literal_is_refused() -> None:
    with pytest.raises(OptionError, match="option 'bits': expected 2, 3 or 4, got '5'"):
        validate_options("alpha", Choices, {"bits": "5"})
