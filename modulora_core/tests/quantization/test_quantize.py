"""Quantizing without calibration: choices, refusals, killed runs, and opening the result."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import partial_name
from modulora_core.errors import (
    CheckpointError,
    OptionError,
    OutputError,
    RequestError,
    WeightError,
)
from modulora_core.models.folders import REQUEST
from modulora_core.models.tokenizer import COPIED_FILES
from modulora_core.quantization.quantize import Assignment, quantize
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.stopped_runs import stop, stored
from modulora_core.tests.tiny_models import save_tiny_model


@pytest.fixture
def source(toy, tmp_path):
    return str(save_tiny_model("llama", tmp_path / "source"))


def test_the_record_says_what_was_asked_and_equal_requests_give_equal_bytes(source, tmp_path):
    for name in ("one", "two"):
        quantize(source, tmp_path / name, "toy", seed=2**63)
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    record = config["quantization_config"]
    assert record["recipes"][0]["distribution"] == "modulora-toy"
    assert record["recipes"][0]["version"] == "1.0"
    assert record["seed"] == 2**63
    assert record["source"]["name"] == "source"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_dense_parameters_are_kept_bit_for_bit_and_listed(source, tmp_path):
    result = quantize(source, tmp_path / "out", "toy", exclude=["*.down_proj"])
    before, after = (
        load_file(folder / "model.safetensors") for folder in (Path(source), tmp_path / "out")
    )
    kept = [name for names in result.kept.values() for name in names]
    assert "model.layers.0.mlp.down_proj.weight" in result.kept["excluded by --exclude *.down_proj"]
    assert set(kept) | set(open_packed(tmp_path / "out").record.weights) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in kept)


@pytest.mark.parametrize("name", COPIED_FILES[::5])
def test_a_file_that_cannot_be_copied_is_refused_before_packing(name, tmp_path, toy):
    save_llama_with_tokenizer(tmp_path / "dense")
    file = tmp_path / "dense" / name.replace("*", "tools")
    file.unlink(missing_ok=True)
    file.mkdir(parents=True)
    with pytest.raises(RequestError):
        quantize(str(tmp_path / "dense"), tmp_path / "out", "toy")
    assert not list(tmp_path.glob("out*/*.safetensors"))


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"options": {"levles": 3}}, OptionError, "levels"),
        ({"exclude": ["*.downproj"]}, OptionError, "down_proj"),
        ({"exclude": ["*"]}, OptionError, r"all stay as they are .*excluded by --exclude \*: 14"),
        (
            {"quantizer": Assignment(default="toy", layers={"*.upproj": "toy"})},
            OptionError,
            r"layers, '\*\.upproj': expected a pattern that matches one or more of the 14 ",
        ),
        (
            {"quantizer": Assignment(default="toy"), "head": "toy"},
            OptionError,
            "head: expected none",
        ),
        ({"head": 3}, OptionError, "head: expected an instance of Choice or a valid string, got 3"),
        ({"device": "cuda:99"}, OptionError, "device 'cuda:99'"),
    ],
)
def test_a_wrong_request_is_refused_and_writes_nothing(source, tmp_path, request_, error, message):
    arguments = {"model": source, "quantizer": "toy", **request_}
    with pytest.raises(error, match=message):
        quantize(out=tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_before_work(source, tmp_path, value):
    path = Path(source) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(source, tmp_path / "out", "toy")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("after", [0, 7])
def test_a_killed_run_resumes_to_the_same_bytes(toy, source, tmp_path, after, monkeypatch):
    pack = toy.Toy.pack  # here it draws random numbers, as some quantizers do
    monkeypatch.setattr(toy.Toy, "pack", lambda self, w, *_: pack(self, w * torch.rand(())))
    quantize(source, tmp_path / "whole", "toy", seed=1)
    out = tmp_path / "out"
    stop(lambda: quantize(source, out, "toy", seed=1), after)
    assert not out.exists()
    changes = ({"options": {"levels": 3}}, {"max_shard_bytes": 20_000})
    for change in changes:
        with pytest.raises(CheckpointError, match="remove the folder to start again"):
            quantize(source, out, "toy", seed=1, resume=True, **change)
    before = stored(partial_name(out))
    with pytest.raises(OutputError, match="--resume"):
        quantize(source, out, "toy", seed=1)
    assert stored(partial_name(out)) == before
    request = partial_name(out) / REQUEST
    text = request.read_text()
    request.write_text('{"record": 5}')
    with pytest.raises(CheckpointError, match=r"request\.json: record: .* remove the folder"):
        quantize(source, out, "toy", seed=1, resume=True)
    request.write_text(text)
    quantize(source, out, "toy", seed=1, resume=True)
    assert stored(out) == stored(tmp_path / "whole")
    assert not partial_name(out).exists()


def test_a_finished_run_says_so_when_it_is_resumed(source, tmp_path, caplog):
    out = tmp_path / "out"
    first = quantize(source, out, "toy")
    before = stored(out)
    with caplog.at_level("INFO", logger="modulora_core"):
        again = quantize(source, out, "toy", resume=True)
    assert "it is finished; nothing is left to resume" in caplog.text
    assert replace(again, seconds=first.seconds, peak_memory_bytes=first.peak_memory_bytes) == first
    assert stored(out) == before
    for other in ({"seed": 1}, {"options": {"levels": 3}}, {"exclude": ["*.q_proj"]}):
        with pytest.raises(OutputError, match="expected it new or empty"):
            quantize(source, out, "toy", resume=True, **other)
    (out / "model.safetensors").unlink(missing_ok=True)  # it isn't whole any more
    for shard in out.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(OutputError, match="expected it new or empty"):
        quantize(source, out, "toy", resume=True)


def test_a_finished_run_of_other_weights_is_not_taken_for_this_one(source, tmp_path, caplog):
    """Two runs whose last folders have one name, as Trainer's have."""
    other = tmp_path / "other" / "source"
    shutil.copytree(source, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    quantize(source, out, "toy")
    with pytest.raises(CheckpointError, match=r"out: expected .* got one of other weights"):
        quantize(str(other), out, "toy", resume=True)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["contents"]  # as an older version wrote it
    (out / "config.json").write_text(json.dumps(config))
    assert quantize(str(other), out, "toy", resume=True).seconds == 0
    assert "without a digest of the model's values" in caplog.text


def test_a_folder_that_is_removed_during_the_run_is_an_error(source, tmp_path):
    partial = partial_name(tmp_path / "out")
    with pytest.raises(
        OutputError, match=r"out\.partial: somebody removed it while it was written"
    ):
        quantize(source, tmp_path / "out", "toy",
                 progress=lambda *_: shutil.rmtree(partial, ignore_errors=True))  # fmt: skip
    assert not (tmp_path / "out").exists()
