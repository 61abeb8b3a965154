from __future__ import annotations

import pytest

from modulora_core.cli.text import counted, format_size, parse_size, some


def test_sizes_are_read_in_binary_and_decimal_units() -> None:
    sizes = {
        "24GiB": 24 * 2**30, "1.5 GB": 1_500_000_000, "800mb": 800_000_000, "4096": 4096,
        "12 B": 12, "1TiB": 2**40,
    }  # fmt: skip
    assert {text: parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 gigs", "1e3", "1,5GB", "nan"])
def test_other_text_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


def test_sizes_are_written_with_a_few_digits() -> None:
    sizes = {
        0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 15 * 2**20: "15.0 MiB",
        1.25 * 2**30: "1.25 GiB", 300 * 2**30: "300 GiB", 2**42: "4.00 TiB",
    }  # fmt: skip
    assert {number: format_size(number) for number in sizes} == sizes


def test_counts_have_singular_and_plural() -> None:
    assert [counted(n, "epoch") for n in (0, 1, 1000)] == ["0 epochs", "1 epoch", "1,000 epochs"]
    assert some(["a", "b"], 2) == "a, b"
    assert some(["a", "b", "c"], 2) == "a, b, ... (3 in all)"
