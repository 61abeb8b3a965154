"""A packed model that was pruned, pickled or dequantized is the same model in the end."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.quantization.quantize import Assignment, quantize
from modulora_core.tests.adapted_models import logits, trained
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llama", "llama-tied", "mixtral", "gpt_oss", "gpt2"])
def packed(request, toy, tmp_path):
    """A model of two quantizers, with a packed head and a packed table."""
    source = save_tiny_model(request.param, tmp_path / "dense")
    tables = {"head": "toy", "embeddings": "verbatim"}
    tied = request.param in ("llama-tied", "gpt2")
    ends = {"embeddings": "verbatim"} if tied else tables
    both = Assignment(default="toy", layers={"*.1.*": "verbatim"}, **ends)
    quantize(str(source), tmp_path / "packed", both)
    return load_model(tmp_path / "packed", device="cpu")


# pruning


def blocks(model):
    return next(module for module in model.modules() if type(module) is nn.ModuleList)


@pytest.mark.parametrize("pruned", [0, 1])
def test_a_pruned_model_is_saved_as_it_is(packed, pruned, tmp_path):
    del blocks(packed)[pruned]
    for module in blocks(packed).modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0
    packed.config.num_hidden_layers = 1
    if getattr(packed.config, "layer_types", None):
        del packed.config.layer_types[pruned]
    packed.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(again), logits(packed))
    record = open_packed(tmp_path / "saved").record
    used = {record.recipes[site.recipe].quantizer for name, site in record.items() if ".0." in name}
    assert used == {("toy", "verbatim")[1 - pruned]}
    named = [name for names in record.kept.values() for name in names]
    assert named
    assert not any(".1." in name for name in named)


def test_a_layer_that_became_dense_is_saved_dense(pack, tmp_path):
    model = load_model(pack("llama", "toy")[1], device="cpu")
    mlp = model.model.layers[1].mlp
    dense = nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    dense.weight.data.copy_(mlp.up_proj.weight.dense(torch.float32))
    before, mlp.up_proj = logits(model), dense
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", device="cpu")
    assert torch.allclose(logits(again), before, atol=1e-5)  # other products
    assert "model.layers.1.mlp.up_proj.weight" not in open_packed(tmp_path / "saved").record.weights


def test_a_packed_weight_of_another_checkpoint_is_refused(pack, tmp_path):
    model = load_model(pack("llama", "toy")[1], device="cpu")
    other = load_model(pack("llama", "verbatim")[1], device="cpu")
    model.model.layers[0].mlp = other.model.layers[0].mlp
    with pytest.raises(ModelError, match=r"0\.mlp\.\w+\.weight: expected a packed weight of this"):
        model.save_pretrained(tmp_path / "saved")


# pickle


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_is_pickled_and_copied(packed, adapted):
    model = trained(packed) if adapted else packed
    again = torch.load(io.BytesIO(pickled(model)), weights_only=False)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert again.num_parameters() == model.num_parameters()


def test_a_mapped_model_is_not_pickled(pack):
    model = load_model(pack("llama", "toy")[1], device="cpu", mapped=True)
    with pytest.raises(ModelError, match=r"pickle: .* got a mapped one.*save_pretrained"):
        pickled(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


# dequantize

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *EXPERTS])
def test_dequantize_keeps_the_order_of_parameters(pack, architecture):
    source, folder = pack(architecture)
    dense = load_model(folder, device="cpu").dequantize()
    expected = AutoModelForCausalLM.from_pretrained(source)
    assert [*dict(dense.named_parameters())] == [*dict(expected.named_parameters())]
