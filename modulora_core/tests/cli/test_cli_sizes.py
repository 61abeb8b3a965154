from __future__ import annotations

import pytest

from modulora_core.cli.sizes import format_size, parse_size


def test_sizes_are_read_in_binary_and_decimal_units() -> None:
    read = {text: parse_size(text) for text in ("24GiB", "1.5 GB", "800mb", "4096", "12 B", "1TiB")}
    assert read == {
        "24GiB": 25_769_803_776,
        "1.5 GB": 1_500_000_000,
        "800mb": 800_000_000,
        "4096": 4096,
        "12 B": 12,
        "1TiB": 1_099_511_627_776,
    }


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 gigs", "1e3", "1,5GB", "nan"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


def test_sizes_are_written_with_a_few_digits() -> None:
    written = [
        format_size(n) for n in (0, 1023, 1024, 1536, 15 * 2**20, 1.25 * 2**30, 300 * 2**30, 2**42)
    ]
    assert written == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 KiB",
        "15.0 MiB",
        "1.25 GiB",
        "300 GiB",
        "4.00 TiB",
    ]
