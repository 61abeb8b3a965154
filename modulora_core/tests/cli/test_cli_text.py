import io
import re
import shlex

from modulora_core.cli.terminal import Report, Terminal
from modulora_core.cli.text import facts, next_commands, parse_size


def test_sizes_are_read_in_binary_and_decimal_units():
    sizes = {
        "24GiB": 24 * 2**30, "1.5 GB": 1_500_000_000, "800mb": 800_000_000, "4096": 4096,
        "12 B": 12, "1TiB": 2**40,
    }  # fmt: skip
    assert {text: parse_size(text) for text in sizes} == sizes


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


def test_facts_have_a_line_for_each_entry(capsys):
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
