from __future__ import annotations

import io
import re
import shlex

import pytest
from rich.console import Group

from modulora_core.cli.terminal import Report, Terminal
from modulora_core.cli.text import (
    WordWrap,
    facts,
    format_size,
    next_commands,
    parse_size,
    size_flag,
)


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


def test_a_long_command_stays_on_its_line_so_that_it_can_be_pasted() -> None:
    command, stdout = f"modulora plan {'--flag value ' * 30}end", io.StringIO()
    Terminal(stdout=stdout).show(Report({}, Group("done", next_commands(command, command))))
    assert stdout.getvalue() == f"done\n\nNext: {command}\n  or: {command}\n"


def test_a_terminal_gets_a_long_command_on_lines_that_a_shell_joins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = "modulora plan --quantize-embeddings gguf:type=Q4_K --prompt 'Sum up: {it}' end"
    monkeypatch.setenv("COLUMNS", "40")
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    Terminal(stdout=screen).show(Report({}, next_commands(command)))
    Terminal(stderr=screen).note(f"$ {command}")
    shown = re.sub("\x1b\\[[^a-zA-Z]*[a-zA-Z]", "", screen.getvalue())
    assert max(map(len, shown.splitlines())) <= 40
    words = shlex.split(shown.replace("\\\n", ""))
    assert words == ["Next:", *shlex.split(command), "$", *shlex.split(command)]


def test_a_size_is_written_as_it_is_read() -> None:
    for text in ("24GiB", "800MB", "1GB", "147MiB", "1500", "1TiB"):
        assert size_flag(parse_size(text)).lower() == text.lower()


def test_facts_have_a_line_for_each_entry(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "out": "here",
        "bytes": 2048,
        "peak_memory_bytes": 1536,
        "seconds": 1.234567,
        "weights": 2048,
        "kept": {"norm": ["a", "b"], "head": ["c"]},
        "options": {"bits": 3, "scale": None, "sym": True},
        "losses": [2.0, 1.5, 1.25, 1.0],
        "eval_loss": None,
        "unreached": [],
    }
    Terminal().show(Report({}, facts(found)))
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line] == [
        "out here",
        "size 2.00 KiB",
        "peak memory 1.50 KiB",
        "seconds 1.2346",
        "weights 2,048",
        "kept dense a, b (norm); c (head)",
        "options bits=3, sym=True",
        "losses 2, 1.5, 1.25, ... (4 in all)",
    ]


def test_streamed_text_breaks_between_words_whatever_its_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "The quick brown fox jumps over it.\n    indented text that is long\n" + "x" * 26
    text += " 敏捷的棕色狐狸跳过了懒狗 end\n"
    lines = [
        "The quick brown fox ", "jumps over it.", "    indented text ", "that is long", "x" * 26,
        "敏捷的棕色狐狸跳过了", "懒狗 end", "",
    ]  # fmt: skip
    for size in (1, 3, 7, len(text)):
        words = WordWrap()
        pieces = (text[start : start + size] for start in range(0, len(text), size))
        assert "".join(map(words.wrap, pieces)).split("\n") == lines
    assert WordWrap().wrap("已经") == "已经", "such text does not wait for a space"


def test_a_terminal_gets_streamed_text_wrapped_and_a_file_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "8")
    file, screen = io.StringIO(), io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    for stream in (file, screen):
        Terminal(stdout=stream).write("one two three\n")
    assert file.getvalue() == "one two three\n"
    assert screen.getvalue() == "one two \nthree\n"
