"""Generation, pipelines and device maps of transformers on packed models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modulora_core import load_model
from modulora_core.errors import ModelError

IDS = torch.tensor([[1, 40, 41, 42], [1, 43, 44, 45]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}


@pytest.fixture(scope="module")
def packed(tunable):
    return load_model(tunable, device="cpu")


@pytest.fixture(scope="module")
def dense(tunable):
    return load_model(tunable, device="cpu").dequantize()


def test_a_static_cache_gives_the_same_tokens(packed):
    expected = packed.generate(IDS, **GREEDY)
    assert torch.equal(packed.generate(IDS, cache_implementation="static", **GREEDY), expected)


def test_assistants_change_no_token(packed, dense):
    one = IDS[:1]
    expected = packed.generate(one, **GREEDY)
    assert torch.equal(packed.generate(one, assistant_model=dense, **GREEDY), expected)
    assert torch.equal(dense.generate(one, assistant_model=packed, **GREEDY), expected)
    assert torch.equal(packed.generate(one, prompt_lookup_num_tokens=2, **GREEDY), expected)


def test_a_pipeline_answers_as_generate_does(packed, tunable):
    tokenizer = AutoTokenizer.from_pretrained(tunable)
    answer = pipeline("text-generation", model=str(tunable), dtype="float32", device="cpu")
    (found,) = answer("the first", max_new_tokens=5, do_sample=False, return_full_text=False)
    ids = tokenizer("the first", return_tensors="pt").input_ids
    new = packed.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert found["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(packed, tunable, device_map):
    model = AutoModelForCausalLM.from_pretrained(tunable, device_map=device_map, dtype="float32")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, packed(IDS).logits)


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_offloaded_parts_are_refused(tunable, tmp_path, rest):
    """accelerate loads them in hooks of modules that are called, and no packed weight is."""
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    parts = {**dict.fromkeys(names, rest), "model.layers.1": "disk"}
    with pytest.raises(
        ModelError, match="device_map: expected devices that hold their parts, got parts on disk"
    ):
        AutoModelForCausalLM.from_pretrained(tunable, device_map=parts, offload_folder=tmp_path)
