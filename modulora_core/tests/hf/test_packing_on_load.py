"""transformers quantizes a dense model while it loads it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modulora_core import ModuLoRAConfig, load_model
from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import (
    CheckpointError,
    OptionError,
    WeightError,
)
from modulora_core.packed_parameters import PackedParameter
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import logits


def loaded(folder, quantizer="toy", head=AutoModelForCausalLM, **more):
    return head.from_pretrained(folder, quantization_config=ModuLoRAConfig(quantizer, **more))


def same_tensors(one, other):
    first, second = one.state_dict(), other.state_dict()
    return {*first} == {*second} and all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-biased", "gpt2", "mixtral"])
def test_it_equals_quantize_then_load_and_saves_itself(pack, tmp_path, architecture):
    source, folder = pack(architecture, "toy")
    model, expected = loaded(source), load_model(folder, device="cpu")
    assert same_tensors(model, expected)
    assert torch.equal(logits(model), logits(expected))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.num_parameters() == expected.num_parameters()
    model.save_pretrained(tmp_path)
    assert same_tensors(load_model(tmp_path, device="cpu"), expected)
    ours, theirs = open_packed(folder).record, open_packed(tmp_path).record
    different = {"source", "contents"}
    assert ours.model_dump(exclude=different) == theirs.model_dump(exclude=different)


def test_one_dense_weight_is_alive_at_a_time(pack, monkeypatch):
    import weakref

    from modulora_core.hf import packing_on_load

    alive = []
    pack_matrices = packing_on_load.pack_matrices

    def counted(name, site, quantizer, matrices, *more, **last):
        assert not [each for each in alive if each() is not None], f"at {name}"
        alive.extend(weakref.ref(matrix) for matrix in matrices)
        return pack_matrices(name, site, quantizer, matrices, *more, **last)

    monkeypatch.setattr(packing_on_load, "pack_matrices", counted)
    loaded(pack("llama", "toy")[0])
    assert len(alive) == 14


def test_a_calibrated_quantizer_is_refused(pack, toy, monkeypatch):
    source = pack("llama", "toy")[0]
    calibrated = toy.TOY.model_copy(update={"calibration": "required"})
    monkeypatch.setattr(Choice, "create", lambda choice: SimpleNamespace(spec=calibrated))
    with pytest.raises(
        OptionError, match=r"toy: expected .* no calibration.* -q toy --calibration"
    ):
        loaded(source)


def test_damaged_files_are_refused(pack, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(pack("llama", "toy")[0])
    name = "model.layers.1.mlp.up_proj.weight"
    source.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: expected its values in the model's files"):
        loaded(tmp_path)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(WeightError, match=f"{name}: expected finite values, got NaN or Inf"):
        loaded(tmp_path)


def test_a_dict_and_a_second_model_take_the_same_config(pack):
    source = pack("llama", "toy")[0]
    config = ModuLoRAConfig("toy", exclude=["*.mlp.*"])
    models = [
        AutoModelForCausalLM.from_pretrained(source, quantization_config=given)
        for given in (config, config, config.to_dict())
    ]
    for model in models:
        assert sum(isinstance(module, PackedParameter) for module in model.modules()) == 8
        assert same_tensors(model, models[0])
    assert config.record is None
