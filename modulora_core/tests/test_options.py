"""Options: words of a command line become a validated model."""

import re
from typing import Literal

import pytest
from pydantic import BaseModel

from modulora_core.errors import OptionError
from modulora_core.options import parse_options, validate_model
from modulora_core.registry import Choice


class Choices(BaseModel):
    bits: Literal[2, 3, 4] = 4
    fraction: Literal[0.5, "all"] | None = None
    word: Literal["2", "x"] = "x"
    flag: Literal[True] | int = 0


def test_parse_options_keeps_everything_after_the_first_equals_sign():
    assert parse_options(["a=1", "b=x=y", "c=", " d =e"]) == {
        "a": "1",
        "b": "x=y",
        "c": "",
        "d": "e",
    }


@pytest.mark.parametrize("words", [["group_size"], ["=64"], ["group_size 64"], ["a=1", "a=2"]])
def test_parse_options_refuses_what_is_not_one_value_for_one_key(words):
    with pytest.raises(OptionError, match="expected"):
        parse_options(words)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["bits=3"], {"bits": 3}),
        (["bits= 2 "], {"bits": 2}),
        (["fraction=0.5"], {"fraction": 0.5}),
        (["fraction=all"], {"fraction": "all"}),
        (["word=2"], {"word": "2"}),
        (["flag=true"], {"flag": True}),
        (["flag=7"], {"flag": 7}),
    ],
)
def test_a_word_is_read_as_the_number_of_a_literal(words, meant):
    read = validate_model("alpha", Choices, parse_options(words)).model_dump()
    expected = Choices(**meant).model_dump()
    assert read == expected
    assert [type(value) for value in read.values()] == [type(value) for value in expected.values()]


# --- a quantizer with options in one word ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("toy", Choice("toy")),
        ("toy:levels=9", Choice("toy", {"levels": "9"})),
        (
            "a-b:c=1,d=x=y:z",
            Choice("a-b", {"c": "1", "d": "x=y:z"}),
        ),  # a value may have what separates
    ],
)
def test_a_label_equals_the_parsed_text(text, expected):
    assert Choice.parse(text) == expected
    assert expected.label == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--some: expected NAME or NAME:KEY=VALUE,..., got ''"),
        (":levels=9", "--some: expected NAME or NAME:KEY=VALUE,..., got ':levels=9'"),
        ("toy:", "--some: expected NAME or NAME:KEY=VALUE,..., got 'toy:'"),
        ("toy:levels", "expected key=value, got 'levels'"),
        ("toy:levels=9,levels=8", "'levels': expected once, got '9' and '8'"),
    ],
)
def test_a_malformed_choice_is_refused_in_the_name_of_its_flag(text, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        Choice.parse(text, "--some")
