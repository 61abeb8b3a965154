"""A plugin's format of whole models in one file: every command takes such a file, and writes it."""

import json

import pytest
import torch

from modulora_core.checkpoints.opening import open_model, open_packed
from modulora_core.cli import main
from modulora_core.errors import ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.models import open_dense
from modulora_core.models.installed_formats import unread_file
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.other_tools import logits


@pytest.fixture
def single(pack, tmp_path):
    """A tiny packed Llama in one file, as the command writes it."""
    path = tmp_path / "model.single"
    _, packed = pack("llama", "toy")
    assert main(["merge", str(packed), str(path), "--json"]) == 0
    return path


def test_a_file_is_a_packed_model(single, pack, tmp_path):
    _, packed = pack("llama", "toy")
    checkpoint = open_packed(single)
    assert checkpoint.format == "single"
    assert len(checkpoint.record.weights) == 14
    assert torch.equal(logits(load_model(checkpoint)), logits(load_model(packed)))


def test_a_file_is_quantized_again_from_its_dense_values(single, tmp_path):
    source = open_dense(str(single))
    source.check_whole()
    assert not source.unplaced
    (name, values), *_ = source.tensors(names=["model.layers.0.mlp.up_proj.weight"])
    (packed,) = open_packed(single).packed(name)
    assert torch.equal(values, packed.tensors["codes"].float() * packed.tensors["scale"])
    quantize(str(single), tmp_path / "again", "verbatim")
    again, before = logits(load_model(tmp_path / "again")), logits(load_model(single))
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_written_as_a_file_and_merged_into_one(single, tmp_path, capsys):
    model = load_model(single)
    add_lora(model, LoRASettings(rank=2))
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.parameters_of("default")["lora_B"].fill_(0.05)
    save_adapter(model, tmp_path / "adapter")
    words = [str(tmp_path / "adapter"), str(tmp_path / "lora.single"), "--to", "single", "--json"]
    capsys.readouterr()
    assert main(["convert", *words]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] == 14
    out = tmp_path / "merged.single"
    words = ["--adapter", str(tmp_path / "adapter"), "--type", "float32"]
    assert main(["merge", str(single), str(out), *words]) == 0
    merged = open_model(str(out))
    assert not hasattr(merged, "record"), "it is dense"
    merged.check_whole()
    assert not merged.unplaced


def test_a_file_that_no_plugin_reads_is_refused_in_one_sentence(single, monkeypatch):
    monkeypatch.setenv("MODULORA_BLOCK", "toy")
    with pytest.raises(ModelError, match=r"expected a folder or a file \*\..*, got the file model"):
        open_dense(str(single))
    assert unread_file("a.single").endswith("files *.single, got none; install one")
