"""A streamed model is the model that transformers loads: names, shapes, dtypes and every bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modulora_core.models import open_dense
from modulora_core.tests.crude_folders import edit_config
from modulora_core.tests.tiny_models import EVERY_ARCHITECTURE, save_tiny_model, tiny_model


def loaded(folder):
    """The tensors that transformers has in memory, without the second name of tied ones."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}


def assert_same(source, expected):
    streamed = dict(source.tensors())
    assert streamed.keys() == expected.keys() == source.parameters.keys()
    for name, tensor in expected.items():
        info = source.parameters[name]
        assert (info.shape, info.dtype, info.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
        assert streamed[name].dtype == tensor.dtype
        assert torch.equal(streamed[name], tensor), f"{name}: other values than transformers loads"


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@EVERY_ARCHITECTURE
def test_streamed_parameters_are_those_that_transformers_loads(architecture, tmp_path):
    """If this fails for a new transformers, compare models/conversion.py with its loading loop."""
    save_tiny_model(architecture, tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    source = open_dense(str(tmp_path))
    source.check_whole()
    assert not source.unplaced
    source.checked_digest()
    assert_same(source, loaded(tmp_path))
    layers = [name.split(".")[2] for name in source.parameters if ".layers." in name]
    assert layers == sorted(layers), "a decoder layer comes together"


@pytest.mark.parametrize(
    ("architecture", "stored", "config"),
    [
        ("llama-tied", torch.float16, "float16"),
        ("deepseek_v3", torch.bfloat16, "bfloat16"),  # keeps its router's bias in fp32
        ("mixtral", torch.float32, "bfloat16"),
        ("llama", torch.bfloat16, None),
    ],
)
def test_the_dtype_is_the_configs_else_the_weights(architecture, stored, config, tmp_path):
    save_tiny_model(architecture, tmp_path, stored)
    edit_config(tmp_path, dtype=config)
    source = open_dense(str(tmp_path))
    assert source.config.dtype == getattr(torch, config or "bfloat16")
    assert_same(source, loaded(tmp_path))


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])
def test_a_folder_of_the_base_model_gets_its_prefix(architecture, tmp_path):
    model = tiny_model(architecture)
    model.config.tie_word_embeddings = True  # the base model has no head to save
    model.config.save_pretrained(tmp_path)
    model.base_model.save_pretrained(tmp_path)
    assert_same(open_dense(str(tmp_path)), loaded(tmp_path))


def test_tied_tensors_are_streamed_once_under_one_name(tmp_path):
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    save_tiny_model("llama-tied", tmp_path)
    change(tmp_path, lambda tensors: tensors.update({head: tensors.pop(table)}))
    assert_same(open_dense(str(tmp_path)), loaded(tmp_path))
    change(tmp_path, lambda tensors: tensors.update({table: tensors[head].clone()}))
    source = open_dense(str(tmp_path))
    assert_same(source, loaded(tmp_path))
    assert source.config.tie_word_embeddings is True


def test_tied_names_with_other_values_are_not_tied(tmp_path):
    save_tiny_model("llama-tied", tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    source = open_dense(str(tmp_path))
    skeleton = source.skeleton()
    assert skeleton.get_output_embeddings().weight is not skeleton.get_input_embeddings().weight
    assert_same(source, loaded(tmp_path))


def test_tensors_that_transformers_ignores_are_not_read(tmp_path):
    save_tiny_model("llama", tmp_path)
    ignored = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tmp_path, lambda tensors: tensors.update({ignored: torch.full((4,), torch.nan)}))
    source = open_dense(str(tmp_path))
    source.checked_digest()
    assert_same(source, loaded(tmp_path))


def test_identity_depends_on_the_model_and_not_on_its_folder(tmp_path):
    folders = [tmp_path / "a" / "tiny", tmp_path / "b" / "tiny", tmp_path / "c" / "tiny"]
    for folder, architecture in zip(folders, ("llama", "llama", "llama-biased"), strict=True):
        save_tiny_model(architecture, folder)
    same, again, other = (open_dense(str(folder)).identity() for folder in folders)
    assert same == again == json.loads(json.dumps(same))
    assert (same["kind"], same["name"]) == ("folder", "tiny")
    assert other["fingerprint"] != same["fingerprint"]
