"""A merged model gives the logits of the packed model with its adapter."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from modulora_core.errors import (
    CheckpointError,
    WeightError,
)
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import logits, randomize, trained
from modulora_core.tests.tiny_models import save_tiny_model
from modulora_core.tiles import tile_budget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", ["llama-biased", "gpt2"])
@pytest.mark.parametrize("scales", [False, True], ids=["plain", "with scales"])
def test_the_merged_model_gives_the_same_logits(pack, architecture, scales, tmp_path):
    packed = pack(architecture, "toy")[1]
    model = trained(load_model(packed), LoRASettings(rank=3, train_scales=scales))
    save_adapter(model, tmp_path / "adapter")
    calls = []
    with tile_budget(5 * 32 * 4):  # a few rows a tile: the rows of v must fit theirs
        result = merge(
            str(packed),
            tmp_path / "merged",
            adapter=tmp_path / "adapter",
            dtype="float32",
            progress=lambda *call: calls.append(call),
        )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert result.adapted == sum(1 for module in model.modules() if hasattr(module, "lora_A"))
    merging = [call for call in calls if call[0] == "merging"]
    assert merging[-1] == calls[-1] == ("merging", len(merging), len(merging))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_merging_warns_as_loading_does(family, toy, tmp_path, caplog):
    """The checkpoint has norms and biases in float32; the model is loaded in bfloat16."""
    packed, other = tmp_path / "packed", tmp_path / "other"
    dense = str(save_tiny_model(family, tmp_path / "dense"))
    quantize(dense, packed, "toy", embeddings=Choice("toy"))
    quantize(dense, other, "verbatim")
    adapter = str(tmp_path / "adapter")
    save_adapter(trained(load_model(packed, dtype="bfloat16")), adapter)
    caplog.clear()  # of the missing tokenizer
    merge(str(packed), tmp_path / "merged", adapter=adapter)
    assert caplog.messages == []
    load_adapter(load_model(other), adapter)
    merge(str(other), tmp_path / "warned", adapter=adapter)
    loading, merging = caplog.messages
    assert merging == loading


def test_changed_or_swapped_files_are_refused_by_their_digests(pack, tmp_path):
    """Codes of the same size are valid codes, so only the digests tell."""
    packed, other = tmp_path / "packed", tmp_path / "other"
    quantize(str(pack("llama")[0]), packed, "toy", max_shard_bytes=8000)
    shutil.copytree(packed, other)
    first, *_ = sorted(packed.glob("*.safetensors"))
    body = bytearray(first.read_bytes())
    body[-1] ^= 1
    first.write_bytes(body)
    with pytest.raises(CheckpointError, match=rf"{first.name}: expected the SHA-256"):
        merge(str(packed), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (other / "README.md").write_text("A card that somebody wrote.")  # not read by merge
    merge(str(other), tmp_path / "merged")


def test_the_adapter_of_a_classifier_makes_a_merged_classifier(pack, tmp_path):
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(pack("llama")[1], num_labels=3, pad_token_id=0)
    add_lora(model, LoRASettings(rank=3))
    randomize(model)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "adapter")
    packed = str(pack("llama")[1])
    found = merge(packed, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    merged = kind.from_pretrained(tmp_path / "merged", pad_token_id=0)
    assert found.task == type(merged).__name__ == "LlamaForSequenceClassification"
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-4, atol=1e-5)
    assert not any("lm_head" in name for name in merged.state_dict())


def test_values_beyond_the_dtype_are_refused(pack, tmp_path):
    dense = pack("llama", "toy")[0]
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    model.save_pretrained(tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "toy")
    merge(str(tmp_path / "packed"), tmp_path / "merged", dtype="bfloat16")
    with pytest.raises(WeightError, match=r"layers.1.mlp.up_proj.*: expected finite .* float16"):
        merge(str(tmp_path / "packed"), tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
