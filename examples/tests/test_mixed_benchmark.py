"""``examples/benchmarks/mixed.py`` on a tiny model: what it makes, that it goes on, and that its numbers fit together."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.data import token_segments
from modulora_core.models import open_model
from modulora_core.tests.adapted_models import save_llama_with_tokenizer

pytest.importorskip("modulora_nf4", reason="something to mix: pip install ./plugins/nf4")
pytest.importorskip("modulora_int8", reason="something to mix: pip install ./plugins/int8")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL, LARGE = "nf4:block_size=32", "int8"
TEXT = ["--calibration", "pydoc[:10%]", "--samples", "4", "--seq-len", "32", "--segments", "4"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("mixed")
    sys.path.remove(str(BENCHMARKS))
    for name in ("mixed", "report", "methods", "peers", "turns"):
        sys.modules.pop(name, None)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "llama"
    save_llama_with_tokenizer(folder)
    return str(folder)


Main = Callable[..., dict[str, Any]]


@pytest.fixture
def run(script: ModuleType, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run it with these flags; give its JSON, and what it printed."""

    def call(*flags: str) -> dict[str, Any]:
        kept = [
            "--model",
            model,
            "--folder",
            str(tmp_path / "work"),
            "--json",
            str(tmp_path / "told.json"),
        ]
        assert script.main([*kept, "--choices", SMALL, LARGE, *TEXT, *flags]) == 0
        captured = capsys.readouterr()
        told = dict(json.loads((tmp_path / "told.json").read_text()))
        return {**told, "printed": captured.out, "made": captured.err.split("\n")[:-1]}

    return call


def perplexity(model: str, folder: Path) -> float:
    """As the loss of transformers' own model says."""
    ids = token_segments("pydoc[90%:]", open_model(model).tokenizer(), 32, 4)
    with torch.no_grad():
        loss = load_model(folder, device="cpu")(ids, labels=ids).loss
    return math.exp(float(loss))


def test_a_mixture_of_a_uniform_choice_s_size(run: Main, model: str, tmp_path: Path) -> None:
    told = run("--as", SMALL, "--compare", LARGE)
    original, small, large, mixed = told["results"]
    assert [row["method"] for row in told["results"]] == ["original", SMALL, LARGE, "mixed"]
    work = tmp_path / "work"
    budget = open_checkpoint(work / "nf4-block_size32").nbytes
    assert told["allocation"]["budget"] == small["bytes"] == budget
    out = work / f"mixed-{budget}"
    assert (
        mixed["bytes"] == open_checkpoint(out).nbytes <= budget < large["bytes"] < original["bytes"]
    )
    # products of fp32 in another order
    assert mixed["perplexity"] == pytest.approx(perplexity(model, out), rel=1e-4)
    assert mixed["measured"] == pytest.approx(
        math.log(mixed["perplexity"] / original["perplexity"])
    )
    assert mixed["estimated"] <= small["estimated"]
    assert large["estimated"] < small["estimated"]
    assert f"| {LARGE} " in told["printed"]

    assert len(told["made"]) == 7, "three checkpoints, and four perplexities"
    again = run("--as", SMALL, "--compare", LARGE)
    assert again["made"] == []
    assert again["results"] == told["results"]
    (work / "int8-perplexity.json").unlink()
    assert run("--as", SMALL, "--compare", LARGE)["made"] == ["evaluate int8-perplexity"]
    with pytest.raises(
        SystemExit, match=r"nf4-block_size32\.json: expected what quantize tells of .*'seed': 1"
    ):
        run("--as", SMALL, "--seed", "1")


def test_average_bits_are_of_the_layers_beside_packed_ends(run: Main, tmp_path: Path) -> None:
    told = run("--bits", "6.5", "--compare", LARGE, "--quantize-embeddings", "int8")
    allocation = told["allocation"]
    weights = sum(choice["weights"] for choice in allocation["choices"])
    assert weights == 2 * (
        2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    )  # q, o; k, v of two heads; gate, up, down
    room = allocation["budget"] - allocation["kept_bytes"] - allocation["ends_bytes"]
    assert room == int(6.5 * weights / 8)
    assert allocation["packed_bytes"] <= room
    assert len({layer["choice"] for layer in allocation["layers"].values()}) == 2
    for name in ("int8", f"mixed-{allocation['budget']}"):
        assert (
            "model.embed_tokens.weight" in open_checkpoint(tmp_path / "work" / name).record.weights
        )


def test_what_the_command_refuses_ends_the_script_with_its_sentence(run: Main) -> None:
    with pytest.raises(SystemExit, match=r"budget: expected at least \d+ bytes"):
        run("--budget", "1KiB", "--compare", LARGE)
