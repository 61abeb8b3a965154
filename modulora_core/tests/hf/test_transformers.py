"""transformers loads, saves and dequantizes packed folders."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import AdapterError, CheckpointError
from modulora_core.hf.load_model import load_model
from modulora_core.packed_parameters import PackedParameter
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import logits, trained
from modulora_core.tests.tiny_models import save_tiny_model


def packed_parameters(model):
    return sum(isinstance(module, PackedParameter) for module in model.modules())


def test_from_pretrained_loads_what_load_model_loads(pack):
    folder = pack("llama", "toy")[1]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert packed_parameters(theirs) == 14
    assert torch.equal(logits(theirs), logits(load_model(folder, device="cpu")))
    assert not any(parameter.requires_grad for parameter in theirs.parameters())


def test_packed_weights_are_counted_as_the_dense_ones(pack, tmp_path):
    for architecture in ("llama-tied", "mixtral"):
        source, folder = pack(architecture, "toy")
        dense = AutoModelForCausalLM.from_pretrained(source)
        packed = load_model(folder, device="cpu")
        assert packed.num_parameters() == dense.num_parameters()
        without = dense.num_parameters(exclude_embeddings=True)
        assert packed.num_parameters(exclude_embeddings=True) == without
        assert packed.num_parameters(only_trainable=True) == 0
        stored = sum(p.nbytes for p in (*packed.parameters(), *packed.buffers()))
        assert packed.get_memory_footprint() == stored < dense.get_memory_footprint() / 2
        assert type(packed).__name__ == type(dense).__name__
        assert type(packed.dequantize()) is type(dense)


def test_a_guard_with_values_is_refused(pack, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "packed"
    model = load_model(pack("llama", "toy")[1], device="cpu")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    guard = next(iter(open_packed(folder).record.guard))
    assert not tensors[guard].numel()
    save_file({**tensors, guard: torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{guard}: expected it packed"):
        open_packed(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_dequantize_gives_a_dense_model(pack, tmp_path, architecture):
    """``verbatim`` packs without an error, so the dense model is the source, to the bit."""
    source, folder = pack(architecture)
    dense = load_model(folder, device="cpu").dequantize()
    dense.save_pretrained(tmp_path / "dense")
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert {*again} == {*state}
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert not hasattr(dense.config, "quantization_config")


def test_dequantize_ties_a_packed_table_again(toy, tmp_path):
    source = save_tiny_model("llama-tied", tmp_path / "dense")
    quantize(str(source), tmp_path / "packed", "verbatim", embeddings=Choice.parse("verbatim"))
    dense = load_model(tmp_path / "packed", device="cpu").dequantize()
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    dense.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(source)))


def test_dequantize_refuses_an_adapter(pack):
    model = trained(load_model(pack("llama", "toy")[1], device="cpu"))
    with pytest.raises(AdapterError, match=r"without an adapter of add_lora.*modulora merge"):
        model.dequantize()
