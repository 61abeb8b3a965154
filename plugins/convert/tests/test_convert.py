"""A packed checkpoint keeps every weight when it is rewritten in another format."""

import json
from pathlib import Path

import pytest
import torch
from modulora_convert.convert import convert
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from modulora_core.checkpoints.opening import open_packed
from modulora_core.cli import main
from modulora_core.errors import ModelError, OptionError, ShapeError
from modulora_core.hf.load_model import load_model
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests import other_tools
from modulora_core.tests.crude_folders import save_crude
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("toy")


def logits(folder):
    return other_tools.logits(load_model(folder, dtype="float32", device="cpu"))


def tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same(one, other):
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def theirs(tmp_path):
    save_crude(tmp_path / "theirs", chosen=lambda name: name.endswith("proj") or name == "lm_head")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    return tmp_path / "theirs"


def test_there_and_back_gives_the_same_model_and_the_same_tensors(theirs, tmp_path):
    seen = []
    result = convert(
        str(theirs), tmp_path / "ours", "modulora", max_shard_bytes=10_000,
        progress=lambda *report: seen.append(report),
    )  # fmt: skip
    checkpoint = open_packed(tmp_path / "ours")
    assert seen[-1] == ("converting", len(seen), len(checkpoint.parameters))
    assert (result.format, result.source_format) == (checkpoint.format, "crude")
    assert checkpoint.format == "modulora"
    assert result.bytes == sum(t.nbytes for t in tensors(tmp_path / "ours").values())
    assert result.weights == sum(site.numel for _, site in checkpoint.record.items())
    assert torch.equal(logits(tmp_path / "ours"), logits(theirs))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    for folder in (theirs, tmp_path / "ours"):
        assert load_model(folder).generation_config.max_new_tokens == 7
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    convert(str(tmp_path / "ours"), tmp_path / "back", "crude", max_shard_bytes=20_000)
    assert_same(tmp_path / "back", theirs)
    assert torch.equal(logits(tmp_path / "back"), logits(theirs))


def test_a_format_that_is_only_read_is_converted_to_ours_and_refused_as_a_target(tmp_path):
    save_crude(tmp_path / "theirs", config_file=None)
    convert(str(tmp_path / "theirs"), tmp_path / "ours", "modulora")
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "theirs"))
    assert "crude_levels" not in config_of(tmp_path / "ours")
    with pytest.raises(
        OptionError, match="'crude_3': expected a format that is written, got one only read"
    ):
        convert(str(tmp_path / "ours"), tmp_path / "back", "crude_3")
    assert not (tmp_path / "back").exists()


def test_ours_to_foreign_writes_its_config_in_every_file_of_it(tmp_path):
    save_tiny_model("llama", tmp_path / "dense")
    options = {"levels": 50}
    quantize(str(tmp_path / "dense"), tmp_path / "ours", "toy", options, exclude=["*.down_proj"])
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "crude")
    config = config_of(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "crude.json").read_text())
    assert config["quantization_config"] == written
    assert (written["levels"], written["version"]) == (50, "crude")
    assert "model.layers.0.mlp.down_proj" in written["kept"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(logits(tmp_path / "theirs"), logits(tmp_path / "ours"))


def refused(source, tmp_path, to, error, match):
    with pytest.raises(error, match=match):
        convert(str(source), tmp_path / "out", to)
    assert not list(tmp_path.glob("out*")), "nothing was written"


def test_a_wrong_format_is_refused(theirs, tmp_path):
    refused(theirs, tmp_path, "nonsense", OptionError, "expected one of modulora, .*crude")
    save_tiny_model("llama", tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path, "crude", ModelError, "quantize it first")
    quantize(str(tmp_path / "dense"), tmp_path / "ours", "toy")
    refused(tmp_path / "ours", tmp_path, "modulora", OptionError, "already; expected .*crude")


@pytest.mark.parametrize(
    ("architecture", "quantizer", "end", "error", "match"),
    [
        ("llama", "verbatim", None, ModelError, r"layers\.0\.\S+_proj: packed by verbatim"),
        ("llama", "toy", Choice("toy"), ModelError, "a packed input embedding"),
        ("qwen3_moe", "toy", None, ModelError, r"experts\.\w+: a stack of 4 experts"),
        ("odd", "toy", None, ShapeError, r"layers\.0\.mlp\.\w+: out_features 42 is not a multiple"),
    ],
)
def test_a_weight_that_the_format_cannot_hold_is_refused_by_name(
    architecture, quantizer, end, error, match, tmp_path
):
    if architecture == "odd":
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 42,
            "num_hidden_layers": 1,
            "vocab_size": 96,
        }
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        model.save_pretrained(tmp_path / "dense")
    else:
        save_tiny_model(architecture, tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "ours", quantizer, embeddings=end)
    refused(tmp_path / "ours", tmp_path, "crude", error, match)


def test_the_command_writes_and_describes_the_formats(theirs, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["convert", str(theirs), out, "--to", "modulora", "--max-shard-size", "20kB", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["format"], told["source_format"]) == (out, "modulora", "crude")
    assert told.keys() >= {"bytes", "seconds", "peak_memory_bytes", "weights"}
    assert len(list(Path(out).glob("*.safetensors"))) > 1
    assert main(["info", str(theirs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "crude"
