"""``examples/benchmarks/quantize_big.py`` on a tiny model: made in shards, quantized, killed in the middle and gone on with."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("modulora_nf4", reason="something to quantize with: pip install ./plugins/nf4")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("quantize_big")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is read from /proc")
def test_a_killed_run_goes_on_and_its_peak_is_told(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = ["--sizes", "tiny", "--folder", str(tmp_path / "models"), "--shard-bytes", "200000"]
    told = script.main(
        [
            *kept,
            "--quantizers",
            "nf4:block_size=32",
            "--kill-at",
            "0.2",
            "--json",
            str(tmp_path / "told.json"),
        ]
    )
    (run,) = told
    assert run.resumed_after >= 8  # of 39
    assert 2**27 < run.peak_bytes < 2**31  # an interpreter with torch, and a tiny model
    (model,) = (tmp_path / "models").iterdir()
    assert len(list(model.glob("*.safetensors"))) == 3
    assert run.source_bytes == sum(f.stat().st_size for f in model.glob("*.safetensors")) - headers(
        model
    )
    assert json.loads((tmp_path / "told.json").read_text())[0]["rate"] == pytest.approx(run.rate)
    assert f"| nf4:block_size=32 | {run.peak_bytes / 2**30:.2f} GiB |" in capfd.readouterr().out


def headers(model: Path) -> int:
    """Bytes of the files that aren't data: 8, and what these 8 say."""
    return sum(
        8 + int.from_bytes(f.read_bytes()[:8], "little") for f in model.glob("*.safetensors")
    )


def test_the_shapes_are_those_of_the_model_that_is_named(script: ModuleType) -> None:
    from transformers import LlamaConfig

    sizes = LlamaConfig(**script.SIZES["7b"], tie_word_embeddings=False)
    weights = sizes.vocab_size * sizes.hidden_size * 2 + sizes.num_hidden_layers * (
        4 * sizes.hidden_size**2
        + 3 * sizes.hidden_size * sizes.intermediate_size
        + 2 * sizes.hidden_size
    )
    assert (
        weights + sizes.hidden_size == 6_738_415_616
    )  # Llama 2's paper and files say 6.74 billion
