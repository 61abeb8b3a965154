"""The demo: its commands, and what it makes of their results."""

import pytest
from modulora_compare.cli import demo

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint


@pytest.mark.parametrize("packed_file", [False, True])
def test_the_demo_finetunes_the_packed_model_and_the_file(
    run, toy, tmp_path, monkeypatch, packed_file
):
    opened = object.__new__(PackedCheckpoint) if packed_file else None
    monkeypatch.setattr("modulora_core.checkpoints.opening.open_model", lambda model: opened)
    steps = []

    def step(*words):
        steps.append([str(word) for word in words])
        return {
            "bytes": 10, "source_bytes": 40, "bits_per_weight": 8.0, "perplexity": 9.0, "text": "a",
            "tokens_per_second": 1.0, "losses": [2.0], "steps": 3, "seconds": 1.0,
            "peak_memory_bytes": 100, "page": "report.html",
        }  # fmt: skip

    monkeypatch.setattr(demo, "_step", step)
    words = ("demo", "--steps", "3", "--out", str(tmp_path / "out"), "-q", "toy")
    code, found, _ = run(*words)
    assert code == 0
    names = [stage["name"] for stage in found["stages"]]
    assert names[-2:] == ["toy", "toy + finetuned"]
    file = ["original file", "original file + finetuned"]
    assert names[:-2] == (file if packed_file else ["original, dense"])
    assert {"quantize", "finetune"} <= found.keys()
    measured, tuned = ["evaluate", "generate"], ["finetune", "evaluate", "generate"]
    first = ["info", *measured, *tuned] if packed_file else measured
    assert [words[0] for words in steps] == [*first, "quantize", *measured, *tuned, "report"]
    trained = [words for words in steps if words[0] == "finetune"]
    assert [words[1] == demo.MODEL for words in trained] == [True, False][1 - packed_file :]
    assert all(words[words.index("--steps") + 1] == "3" for words in trained)
    (tmp_path / "out" / "mine").touch()
    code, found, _ = run(*words)
    assert (code, found["error"]["kind"]) == (2, "OutputError")
