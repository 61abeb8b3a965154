"""A streamed model is the model that transformers loads: names, shapes, dtypes and every bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modulora_core.models import ModelSource, open_model
from modulora_core.tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_model


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers has in memory, without the second name of tied tensors."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}


def assert_same(source: ModelSource, expected: dict[str, torch.Tensor]) -> None:
    streamed = dict(source.tensors())
    assert set(streamed) == set(expected) == set(source.parameters)
    for name, tensor in expected.items():
        assert streamed[name].dtype == tensor.dtype == source.parameters[name].dtype, name
        assert (
            tuple(streamed[name].shape) == tuple(tensor.shape) == source.parameters[name].shape
        ), name
        assert torch.equal(streamed[name], tensor), f"{name}: other values than transformers loads"
        assert source.parameters[name].nbytes == tensor.nbytes, name


@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_parameters_are_those_that_transformers_loads(
    architecture: str, shards: str, tmp_path: Path
) -> None:
    """If this fails for a new transformers, compare sources/conversion.py with its loading loop."""
    save_tiny_model(architecture, tmp_path, max_shard_size="1GB" if shards == "one" else "20KB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "many")
    source = open_model(str(tmp_path))
    assert source.validate() == []
    source.check_finite()
    assert_same(source, loaded(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral", "deepseek_v3"])
def test_16_bit_models_keep_their_dtypes(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_tiny_model(architecture, tmp_path, dtype)
    source = open_model(str(tmp_path))
    assert source.config.dtype == dtype
    assert_same(source, loaded(tmp_path))


def test_weights_are_cast_to_the_dtype_of_the_config(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    source = open_model(str(tmp_path))
    assert {info.dtype for info in source.parameters.values()} == {torch.bfloat16}
    assert_same(source, loaded(tmp_path))


def test_a_config_without_dtype_takes_that_of_the_weights(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_model(str(tmp_path))
    assert source.config.dtype == torch.bfloat16
    assert_same(source, loaded(tmp_path))


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])
def test_a_checkpoint_of_the_base_model_gets_its_prefix(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    model.config.tie_word_embeddings = True  # the base model has no head to save
    model.config.save_pretrained(tmp_path)
    model.base_model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not any(name.startswith(model.base_model_prefix + ".") for name in names)
    assert_same(open_model(str(tmp_path)), loaded(tmp_path))


@pytest.mark.parametrize("only", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_tensor_may_be_saved_under_either_name(only: str, tmp_path: Path) -> None:
    save_tiny_model("llama-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[only] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_model(str(tmp_path))
    assert source.validate() == []
    assert_same(source, loaded(tmp_path))
    assert "lm_head.weight" not in source.parameters


def test_a_tied_tensor_that_is_saved_twice_is_streamed_once(tmp_path: Path) -> None:
    save_tiny_model("llama-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_model(str(tmp_path))
    assert source.config.tie_word_embeddings is True
    expected = loaded(tmp_path)
    expected.pop("lm_head.weight", None)  # transformers 5.0 leaves equal tensors apart
    assert_same(source, expected)


def test_tied_names_with_other_values_are_not_tied(tmp_path: Path) -> None:
    save_tiny_model("llama-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_model(str(tmp_path))
    assert source.config.tie_word_embeddings is False
    skeleton = source.skeleton()
    assert skeleton.get_output_embeddings().weight is not skeleton.get_input_embeddings().weight
    assert_same(source, loaded(tmp_path))


def test_a_decoder_layer_comes_together(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path, max_shard_size="20KB")
    layers = [
        name.split(".")[2] for name, _ in open_model(str(tmp_path)).tensors() if ".layers." in name
    ]
    assert layers == sorted(layers)


def test_the_skeleton_takes_no_memory_and_has_every_parameter(tmp_path: Path) -> None:
    source = open_model(str(save_tiny_model("mixtral", tmp_path)))
    skeleton = source.skeleton()
    assert {tensor.device.type for tensor in skeleton.state_dict().values()} == {"meta"}
    assert {n: (tuple(p.shape), p.dtype) for n, p in skeleton.named_parameters()} == {
        name: (info.shape, info.dtype) for name, info in source.parameters.items()
    }
    skeleton.model.layers[0] = torch.nn.Identity()
    assert source.skeleton().model.layers[0] is not skeleton.model.layers[0]


def test_progress_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    source = open_model(str(save_tiny_model("mixtral", tmp_path)))
    stored = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    for work in (source.check_finite, lambda progress: list(source.tensors(progress))):
        seen: list[tuple[int, int]] = []
        work(lambda done, total, seen=seen: seen.append((done, total)))
        assert {total for _, total in seen} == {stored}
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == stored


def test_tensors_that_the_model_has_no_place_for_are_listed_not_streamed(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.full((2, 2), torch.nan)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
        4
    )  # transformers ignores it
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_model(str(tmp_path))
    assert source.validate() == ["model.layers.7.mlp.up_proj.weight"]
    source.check_finite()
    assert_same(source, loaded(tmp_path))


def test_opening_without_weights_reads_the_config_alone(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    source = open_model(str(tmp_path), weights=False)
    assert sum(p.numel() for p in source.skeleton().parameters()) == sum(
        p.numel() for p in tiny_model("llama").parameters()
    )


def test_identity_depends_on_the_model_and_not_on_where_it_is(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "tiny", tmp_path / "b" / "tiny", tmp_path / "c" / "tiny"]
    for folder, architecture in zip(folders, ("llama", "llama", "llama-biased"), strict=True):
        save_tiny_model(architecture, folder)
    same, again, other = (open_model(str(folder)).identity() for folder in folders)
    assert same == again
    assert (same["kind"], same["name"]) == ("folder", "tiny")
    assert json.loads(json.dumps(same)) == same
    assert other["fingerprint"] != same["fingerprint"]
