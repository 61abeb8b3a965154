"""A step of a tiny Llama with random packed weights, and its checks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modulora_core.checkpoints.opening import open_packed

pytest.importorskip("modulora_nf4", reason="pip install ./plugins/nf4")


def test_the_script_measures_a_step(module, tmp_path, capsys):
    file = tmp_path / "result.json"
    flags = ["--model", "tiny", "-q", "nf4", "--seq-len", "16", "--mapped", "--one-process"]
    flags += ["--folder", str(tmp_path), "--json", str(file)]
    assert module("llama65b").main(flags) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    backward = found["phases"]["backward"]
    assert backward["gradients"] == 2 * 7 * 2, "A and B of seven layers in two blocks"
    assert backward["bad_gradients"] == []
    # logits of variance 1 have a loss of log(512) + 0.5, within its spread over 15 tokens
    assert abs(found["phases"]["forward"]["loss"] - 6.74) < 4 * 15**-0.5
    assert backward["trained"] == 2 * 8 * (4 * (128 + 128) + 3 * (128 + 344)), "A and B of rank 8"
    checkpoint = open_packed(tmp_path / "tiny-nf4")
    assert found["checkpoint_bytes"] == checkpoint.nbytes
    assert "Wrong gradients: none" in capsys.readouterr().out
