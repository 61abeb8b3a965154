"""Damaged EXL3 folders are refused in one sentence, with exit code 2."""

import json

import pytest
import torch
from exl3_folders import UP, alike, save_exl3
from safetensors.torch import load_file, save_file

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.tests.fuzzing import refused_or_runs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exl3")
    save_exl3(folder, choice=alike(2, "mcg"), num_hidden_layers=1)
    return folder


def changed(saved, folder, change):
    """A copy of the folder with changed tensors."""
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: t.clone() for name, t in load_file(saved / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def put(name, tensor):
    """Put a tensor into the layer; None drops it."""
    key = f"{UP}.{name}"
    return lambda tensors: tensors.pop(key) if tensor is None else tensors.update({key: tensor})


def walks(*shape):
    return torch.zeros(shape, dtype=torch.int16)


BAD = {
    "9 bits": (put("trellis", walks(8, 16, 144)), r"trellis: expected 16 K numbers .* from 1 to 8"),
    "4.5 bits": (put("trellis", walks(8, 16, 72)), r"from 1 to 8 bits, or 1\.5, 2\.5 or 3\.5"),
    "half a bit of another code": (
        put("trellis", walks(8, 16, 40)), rf"{UP}: expected the code mul1 for 2\.5 bits, got mcg"
    ),
    "a table": (
        lambda tensors: tensors.update({"model.embed_tokens.trellis": walks(8, 16, 32)}),
        r"model\.embed_tokens: expected a linear layer, got an embedding table: ExLlamaV3 1\.6",
    ),
    "out": (put("trellis", walks(8, 17, 32)), "multiple of 128 as out_features, got 272"),
    "another size": (put("trellis", walks(8, 24, 32)), r"svh: expected float16 \[384\] by trellis"),
    "another rank": (put("trellis", walks(8, 512)), r"trellis: expected int16 \[in / 16"),
    "no trellis": (put("trellis", None), r"trellis: expected it beside mcg, suh, svh, got nothing"),
    "both codes": (put("mul1", torch.tensor(1).int()), r"expected mcg or mul1, .* got both"),
    "whole scales": (put("suh", torch.ones(128).int()), r"suh: expected float16 \[128\] by"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_tensors_are_refused(name, saved, tmp_path, refused):
    change, message = BAD[name]
    folder = changed(saved, tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        open_packed(folder)
    refused(["info", folder])


def configured(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("key", "value"), [("codebook", "newcode2027"), ("format", "exl3_v2")])
def test_an_unknown_code_or_format_is_refused(key, value, saved, tmp_path):
    folder = configured(changed(saved, tmp_path / "m", lambda _: None), **{key: value})
    with pytest.raises(ModelError, match=rf"EXL3 config: {key}: expected .*, got '{value}'"):
        open_packed(folder)


@pytest.mark.parametrize("storage", [True, False])
def test_a_lost_code_mark_is_refused(storage, saved, tmp_path):
    """Without its mark a layer would be decoded as 3inst."""
    more = {} if storage else {"tensor_storage": None, "codebook": "mcg"}
    folder = configured(changed(saved, tmp_path / "m", put("mcg", None)), **more)
    with pytest.raises(CheckpointError, match=rf"{UP}: expected the code function mcg by config"):
        open_packed(folder)


def test_another_multiplier_is_refused(saved, tmp_path):
    folder = changed(saved, tmp_path / "m", put("mcg", torch.tensor(5).int()))
    with pytest.raises(CheckpointError, match=r"mcg: expected the multiplier 0xcbac1fed, got 5"):
        load_model(folder)


def test_sizes_that_padding_does_not_explain_are_refused(saved, tmp_path):
    folder = changed(saved, tmp_path / "m", lambda _: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"expected \[128, 128\] by the config.*got \[256"):
        open_packed(folder)


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(saved):
    refused_or_runs(saved)
