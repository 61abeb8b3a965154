import io
import re
import shlex

from modulora_core.cli.terminal import Report, Terminal
from modulora_core.cli.text import next_commands, parse_size, size_flag


def test_sizes_are_read_in_binary_and_decimal_units():
    sizes = {
        "24GiB": 24 * 2**30, "1.5 GB": 1_500_000_000, "800mb": 800_000_000, "4096": 4096,
        "12 B": 12, "1TiB": 2**40,
    }  # fmt: skip
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("24GiB", "800MB", "147MiB", "1500"):
        assert size_flag(parse_size(text)) == text


def test_a_terminal_gets_a_long_command_on_lines_that_a_shell_joins(monkeypatch):
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
