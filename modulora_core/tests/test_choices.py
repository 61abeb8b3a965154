"""A quantizer with options, in one word."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from modulora_core.errors import OptionError, PluginError
from modulora_core.registry import Choice


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
def test_a_label_is_what_was_parsed(text: str, expected: Choice) -> None:
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
def test_what_is_neither_is_refused_in_the_name_of_its_option(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        Choice.parse(text, "--some")


def test_options_are_checked_when_the_quantizer_is_made(toy: ModuleType) -> None:
    quantizer = Choice.parse("toy:levels=9").create()
    assert quantizer.options.model_dump() == {"levels": 9}
    with pytest.raises(OptionError, match="levels"):
        Choice("toy", {"levels": 1000}).create()
    with pytest.raises(PluginError, match="nobody"):
        Choice("nobody").create()
