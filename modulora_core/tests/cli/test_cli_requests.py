"""A wrong request is refused before torch is imported, which takes many seconds."""

import json
import os
import subprocess
import sys

import pytest

from modulora_core.errors import OutputError
from modulora_core.tests.conftest import TOY_SITE

RUN = """
import json, sys
sys.modules["torch"] = None  # importing it raises ImportError
from modulora_core.cli import main
for words in json.load(sys.stdin):
    print(json.dumps([main([*words, "--json"])]))
"""

LINK = "output folder link: expected a folder or nothing, found a link"
ABSENT = "model ./absent: no such file or folder"
SLICE = "pydoc[90%]: expected a slice in percent such as"
NEAR = "quantizer 'tyo' isn't installed; did you mean 'toy"

WRONG = {
    "finetune ./absent OUT --data pydoc": ABSENT,
    "finetune MODEL OUT": "data: expected training data, got none; give --data SOURCE",
    "finetune MODEL OUT --data absent.txt": "absent.txt: expected a file, and there is none",
    "finetune MODEL OUT --data notes.txt --eval-data ./absent": "./absent: expected a file",
    "finetune MODEL OUT --data pydoc --adapter ./absent": "adapter ./absent: expected a folder",
    "finetune MODEL OUT --data pydoc -q tyo": NEAR,
    "finetune MODEL OUT --data wrong.jsonl": "wrong.jsonl, line 2: completion: expected a string",
    "finetune MODEL OUT --data notes.txt --eval-data wrong.jsonl": "wrong.jsonl, line 2: ",
    "finetune MODEL OUT --data wrong.jsonl --format chat": "line 1: messages: ",
    "finetune MODEL OUT --data wrong.jsonl --prompt {x} --completion {y}": "the column 'x'",
    "finetune MODEL notes.txt --data pydoc": "expected a folder or nothing, found a file",
    "finetune MODEL done --data pydoc": "output folder done: it holds a finished adapter",
    "finetune --config run.yaml": ABSENT,
    "plan MODEL -q tyo": NEAR,
    "compare MODEL -q tyo": NEAR,
    "bench tyo": NEAR,
    "evaluate MODEL --data pydoc[90%]": SLICE,
    "evaluate MODEL --data broken.jsonl": "broken.jsonl, line 2: Invalid JSON",
    "quantize MODEL OUT -q toy --calibration broken.jsonl": "broken.jsonl, line 2: Invalid JSON",
    "generate ./absent Hello": ABSENT,
    "chat MODEL --adapter ./absent": "adapter ./absent: expected a folder or a Hub id",
    "convert MODEL OUT --to ggfu": "format 'ggfu': expected one of modulora, ",
    "convert MODEL link --to crude": LINK,
    "merge MODEL OUT --adapter empty": "adapter empty: expected adapter_config.json in it",
    "quantize MODEL link -q toy": LINK,
    "quantize MODEL OUT -q toy --calibration absent.txt": "absent.txt: expected a file",
}


def test_a_wrong_request_is_refused_without_torch(tmp_path):
    for name in ("MODEL", "empty", "done"):
        (tmp_path / name).mkdir()
    (tmp_path / "done" / "adapter_config.json").write_text("{}")
    (tmp_path / "MODEL" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "notes.txt").write_text("The ship sailed north.")
    rows = ('{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": 1}')
    (tmp_path / "wrong.jsonl").write_text("\n".join(rows))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "run.yaml").write_text("{model: ./absent, out: OUT, data: notes.txt}")
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([words.split() for words in WRONG]),
        cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(TOY_SITE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for words, report, code in zip(WRONG, lines[::2], lines[1::2], strict=True):
        message = report["error"]["message"]
        assert WRONG[words] in message, (words, message)
        assert code == [2], words
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "MODEL",
        "empty",
        "done",
        "link",
        "notes.txt",
        "run.yaml",
        "wrong.jsonl",
        "broken.jsonl",
    }


def test_a_run_is_written_through_a_link(tmp_path):
    """A run is written in its place, so no rename would fail at its end."""
    from modulora_core.training.resuming import check_new

    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    check_new(tmp_path / "link")
    (tmp_path / "disk" / "notes.txt").touch()
    with pytest.raises(OutputError, match="expected it new or empty"):
        check_new(tmp_path / "link")
