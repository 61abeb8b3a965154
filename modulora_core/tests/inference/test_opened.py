"""A model is opened before its weights are loaded, and a wrong request is refused then."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulora_core.errors import AdapterError, CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.inference.opened import open_to_run
from modulora_core.tests.adapted_models import logits, trained


def test_a_dense_model_is_loaded_as_transformers_loads_it(pack):
    dense = pack("llama")[0]
    model = open_to_run(str(dense), dtype="float32", device="cpu").load()
    assert not model.training
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


def test_a_dense_model_with_an_adapter_is_refused(pack):
    with pytest.raises(AdapterError, match="adapter a: expected a packed model for it, and"):
        open_to_run(str(pack("llama")[0]), device="cpu", adapter="a")


def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_loaded(pack, tmp_path):
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path / "a")
    for model, adapter, message in (
        ("llama", tmp_path / "none", "adapter .*none: expected a folder or a Hub id"),
        ("gpt2", tmp_path / "a", "it does not fit .*: there is no packed layer"),
    ):
        with pytest.raises(AdapterError, match=message):
            open_to_run(str(pack(model)[1]), adapter=adapter, device="cpu")


def test_files_that_cannot_be_loaded_are_refused_by_name(pack, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pack("llama")[0], folder)
    opened = open_to_run(str(folder), device="cpu")
    with pytest.raises(ModelError, match=f"model {folder}: .*tokenizer"):
        _ = opened.tokenizer
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"model {folder}: transformers cannot load it"):
        opened.load()
