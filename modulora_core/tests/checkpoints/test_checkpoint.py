"""A packed folder is checked when it is opened."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from modulora_convert.convert import convert
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.cli.info import command as info
from modulora_core.errors import CheckpointError, ModelError, OptionError, PluginError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(pack, tmp_path):
    """A copy of a tiny packed Llama."""
    return Path(shutil.copytree(pack("llama", "toy")[1], tmp_path / "packed"))


def edit_record(folder, edit):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_the_record_is_written_as_it_was_read(folder):
    text = json.loads((folder / "config.json").read_text())["quantization_config"]
    record = QuantizationRecord.from_json(text)
    assert json.loads(json.dumps(record.to_json())) == text
    assert record.nbytes == sum(site.nbytes for _, site in record.items())
    assert 8 < record.bits_per_weight < 10


def site(**changes):
    return lambda record: record["sites"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record.update(format=2), "reads 1, got 2, .*install another version"),
        (
            lambda record: record.pop("sites"),
            r"config\.json: malformed quantization_config: sites: Field required",
        ),
        (site(kind="cube"), "sites: 0: kind: expected .*'cube'"),
        (site(recipe=1), "expected a recipe 0 to 0, got recipe 1"),
        (site(layout={}), r"config\.json: layout of a packed weight: expected"),
        (lambda record: record["weights"].update({UP: 99}), "expected a site 0 to .*, got site 99"),
        (
            lambda record: record["weights"].update({"w": 0}),
            "w.codes: expected .* by config.json, got none",
        ),
        (
            lambda record: record["sites"][0]["layout"]["tensors"].update(scale=["float32", [7]]),
            r"expected float32 \[7\] by config\.json, got",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(edit, message, folder):
    edit_record(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        open_packed(folder)


def test_a_missing_plugin_is_named_with_the_package_to_install(folder):
    edit_record(folder, lambda record: record["recipes"][0].update(
        quantizer="absent", distribution="modulora-absent"
    ))  # fmt: skip
    with pytest.raises(PluginError, match="Install its package, modulora-absent"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight.scale"])
def test_values_that_are_not_finite_are_refused_by_name(folder, name):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink()  # merge would refuse the changed file
    expected = f"^(?!None).*{re.escape(name)}: expected finite values, got NaN or Inf"
    merging = partial(merge, out=folder.parent / "out")
    for reads in (load_model, AutoModelForCausalLM.from_pretrained, merging):
        with pytest.raises(CheckpointError, match=expected):
            reads(str(folder))


def test_a_wrong_request_is_refused(folder, tmp_path):
    with pytest.raises(OptionError, match=r"dtype: expected one of auto, .*got 'float8'"):
        load_model(folder, dtype="float8")
    with pytest.raises(ModelError, match="no tokenizer files, such as tokenizer"):
        open_packed(folder).tokenizer()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json; expected a folder"):
        open_packed(tmp_path / "empty")


def without(name):
    def damage(folder):
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def whole_numbers(folder):
    """The header of a dense tensor says I32: transformers would cast its bits to floats."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int32)
    save_file(tensors, path, metadata={"format": "pt"})


def configured(**values):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("model.norm.weight"), r"model\.norm\.weight"),
        (whole_numbers, r"norm\.weight: expected floats \[32\] by config.json, got integers"),
        (lambda folder: edit_record(folder, lambda record: record.update(weights={})), "weight: "),
        (configured(num_hidden_layers=1), r"layers\.1\."),
        (configured(intermediate_size=40), r"expected shape \[32, 40\]"),
        (
            configured(attention_bias=True),
            r"k_proj\.bias: expected floats \[16\] by config\.json, got none",
        ),
        (configured(hidden_act="gone"), "transformers can't build"),
    ],
    ids=["norm", "integers", "weights", "layers", "size", "bias", "activation"],
)
def test_every_command_refuses_a_folder_that_is_not_a_whole_model(
    folder, damage, message, tmp_path
):
    damage(folder)
    out = tmp_path / "out"
    commands = (load_model, info, partial(merge, out=out), partial(convert, out=out, to="crude"))
    for run in commands:
        with pytest.raises((CheckpointError, ModelError), match=message):
            run(str(folder))
    assert not out.exists()
