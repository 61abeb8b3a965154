"""Templates make prompts and completions from any columns."""

import pytest

from modulora_core.data.files import Record
from modulora_core.data.templates import Template
from modulora_core.errors import DataError, OptionError


def test_columns_are_filled_in_and_null_is_empty():
    row = {"a b": "x{y}", "n": 3, "f": 0.5, "none": None, "unused": [1]}
    (filled,) = Template("{{{a b}}} {n} {n} {f}", " {none}").fill([Record(row, "here")])
    assert filled == Record({"prompt": "{x{y}} 3 3 0.5", "completion": " "}, "here")


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("{a}", None, "completion: expected prompt and completion together"),
        ("no column", "{a}", "prompt: expected a template with a column in braces"),
        ("{a}", "{", "completion: expected columns in braces"),
        ("{a.__class__}", "{a}", "prompt: expected the name of a column .* got 'a.__class__'"),
        ("{0}", "{a}", "expected the name of a column"),
    ],
)
def test_a_wrong_template_is_refused(prompt, completion, message):
    with pytest.raises(OptionError, match=message):
        Template.of(prompt, completion)


def test_a_column_that_is_missing_or_no_text_is_refused():
    with pytest.raises(DataError, match="row 2: prompt: expected the column 'b', got a"):
        Template("{b}", "{a}").fill([Record({"a": "x"}, "row 2")])
    with pytest.raises(DataError, match=r"text or a number in the column 'a', got \['x'\]"):
        Template("{a}", "{a}").fill([Record({"a": ["x"]}, "row 2")])
