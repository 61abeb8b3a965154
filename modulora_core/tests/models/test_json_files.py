"""Files of strangers: one line of message, in time, for whatever they hold."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from modulora_core.errors import AdapterError, ModelError
from modulora_core.models.json_files import (
    read_json,
    read_yaml,
    repair_journal,
)
from modulora_core.models.system_errors import as_output_error, said_by_system

DEEP = 100_000
BROKEN = {
    "[" * DEEP + "]" * DEEP: "recursion limit",
    '{"a": %s}' % ("9" * 5000): "number out of range",
    r'{"a": "\ud800"}': "unexpected end of hex escape",
    '{"a": ': "EOF while parsing",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_broken_json_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(AdapterError, match=rf"x\.json: .*{BROKEN[text]}"):
        read_json(tmp_path / "x.json", dict[str, Any], error=AdapterError)


def test_a_large_or_unreadable_file_is_refused(tmp_path):
    (tmp_path / "long").write_bytes(b'"' + b"x" * 2**25 + b'"')
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait
    for name, message in {
        "long": "at most 32 MiB",
        "folder": "expected a file",
        "pipe": "expected a file",
        "absent": "No such file",
        "x" * 300: "too long",
        "a\0b": "null",
    }.items():
        with pytest.raises(ModelError, match=message):
            read_json(tmp_path / name, dict[str, Any], error=ModelError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "maximum recursion depth"),
        ("a: !!python/object:os.system x", "expected YAML, got: could not determine a constructor"),
        ("a: [", "expected YAML, got: while parsing"),
        ("a: \xff", "utf-8"),
    ],
    ids=["deep", "object", "cut", "bytes"],
)
def test_broken_yaml_is_refused_in_one_line(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text, "latin-1")
    with pytest.raises(ModelError, match=rf"x\.yaml: .*{message}") as found:
        read_yaml(tmp_path / "x.yaml", ModelError)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "broken", [b'["c", {"x": "1"}]', b'["c", {"x": 1}]\n', b"\0\0\n", b'["c"]\n', b"5\n"], ids=str
)
def test_a_journal_ends_at_its_first_broken_line(broken, tmp_path):
    whole = b'["a", {"x": "1"}]\n["b", {}]\n'
    (tmp_path / "x").write_bytes(whole + broken + (whole if broken.endswith(b"\n") else b""))
    assert repair_journal(tmp_path / "x", dict[str, str]) == {"a": {"x": "1"}, "b": {}}
    assert (tmp_path / "x").read_bytes() == whole
    assert repair_journal(tmp_path / "missing", dict[str, str]) == {}
    assert not (tmp_path / "missing").exists()


def test_a_full_disk_says_what_to_do():
    with pytest.raises(OSError, match="No space") as found, Path("/dev/full").open("w") as full:
        full.write("x" * 10**6)
    error = as_output_error(found.value, Path("OUT"))
    assert str(error).startswith("OUT: ")
    assert "free some room" in str(error)
    for size in (10, 10**6):  # the system fails at the end, or before
        with pytest.raises(RuntimeError) as torchs:
            torch.save(torch.zeros(size), "/dev/full")
        error = as_output_error(torchs.value, Path("OUT"))
        assert str(error).startswith("OUT: can't be written whole; free some room")
    assert as_output_error(FileNotFoundError(2, "No such file", "x"), Path("OUT")) is None
    assert said_by_system(FileNotFoundError(2, "No such file", "x")) == "x: No such file"
    assert said_by_system(OSError("a library's own words")) is None
