"""A model whose head and embedding are packed, through the commands as a user types them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulora_core.cli import main
from modulora_core.tests.tiny_models import tiny_config
from modulora_core.tests.tiny_tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ENDS = ("--quantize-head", "toy", "--quantize-embeddings", "toy:levels=127")

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], toy: ModuleType) -> Run:
    """``run("info", path)`` gives the exit code and the JSON object of stdout."""

    def run(*words: object) -> tuple[int, dict[str, Any]]:
        code = main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(params=["llama", "llama-tied"])
def packed(request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = tiny_config(request.param)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    options = ENDS if request.param == "llama" else ENDS[2:]
    code, told = run(
        "quantize", tmp_path / "source", tmp_path / "packed", "-q", "verbatim", *options
    )
    assert code == 0, told
    assert not set(told["kept"]) & {"embedding", "output head"}
    return tmp_path / "packed"


def test_every_command_takes_a_model_with_packed_ends(
    run: Run, packed: Path, text: Path, tmp_path: Path
) -> None:
    tied = json.loads((packed / "config.json").read_text())["tie_word_embeddings"]
    _, told = run("info", packed)
    by_name = {group["quantizer"]: group for group in told["quantizers"]}
    assert by_name["verbatim"]["parameters"] == 14
    assert by_name["toy"]["parameters"] == (1 if tied else 2)

    few = ("--steps", 2, "--batch-size", 2, "--grad-accum", 1, "--seq-len", 16)
    adapter = tmp_path / "adapter"
    code, told = run("finetune", packed, adapter, "--data", text, *few)
    assert code == 0, told
    assert all(math.isfinite(loss) for loss in told["losses"])
    code, told = run("generate", packed, "The", "--adapter", adapter, "--max-new-tokens", 3)
    assert code == 0, told

    code, told = run(
        "merge", packed, tmp_path / "merged", "--adapter", adapter, "--dtype", "float32"
    )
    assert code == 0, told
    scope = ("--data", text, "--seq-len", 16, "--segments", 3)
    _, ours = run("evaluate", packed, "--adapter", adapter, *scope)
    _, merged = run("evaluate", tmp_path / "merged", *scope)
    # the order of fp32 sums
    assert ours["perplexity"] == pytest.approx(merged["perplexity"], rel=1e-5)
    dense = run("evaluate", tmp_path / "source", *scope)[1]["perplexity"]
    rounded = run("evaluate", packed, *scope)[1]["perplexity"]
    # 8 bits move a weight by 1/254 of a row's largest at most
    assert rounded == pytest.approx(dense, rel=0.01)

    code, told = run("plan", packed, "--seq-len", 32)
    assert code == 0, told


@pytest.mark.parametrize("option", ["--quantize-head", "--quantize-embeddings"])
def test_a_quantizer_without_its_options_is_refused(run: Run, option: str, tmp_path: Path) -> None:
    code, told = run(
        "quantize", tmp_path / "nothing", tmp_path / "out", "-q", "toy", option, "toy:"
    )
    assert code == 2
    assert told["error"]["message"] == f"{option}: expected NAME or NAME:KEY=VALUE,..., got 'toy:'"
