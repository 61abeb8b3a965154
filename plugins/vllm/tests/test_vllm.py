"""vLLM's LoRA loader takes our adapters: its rules, and the weights that result."""

import json

import pytest
import torch
from modulora_convert.convert import convert
from modulora_vllm.export import export_for_vllm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modulora_core import registry
from modulora_core.cli import main
from modulora_core.errors import AdapterError, OptionError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import logits, randomize, trained

PREFIX = "base_model.model."


def adapter_of(packed, out):
    """The model with an adapter, of less rank on the narrow layers, which is saved to ``out``."""
    model = trained(load_model(packed, device="cpu"), LoRASettings(rank=4, alpha=7.0))
    save_adapter(model, out)
    return model


def read_by_the_rules_of_vllm(folder, stored):
    """s · B A by the name of each weight, as vLLM's loader understands a folder.

    From vllm/lora: ``PEFTHelper`` wants r, lora_alpha and target_modules, refuses modules_to_save
    and DoRA, and takes one scale for all. ``parse_fine_tuned_lora_name`` wants names
    ``base_model.model.<module>.lora_A.weight``. ``LoRAModel.from_local_checkpoint`` wants modules
    of the model; of stored names of experts with their number, or ``experts`` for gate_up_proj as
    ``base_layer`` and down_proj. ``_stack_moe_lora_weights`` takes such a pair apart.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    scale = config["lora_alpha"] / config["r"]
    tensors, products = load_file(folder / "adapter_model.safetensors"), {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"))
        if f"{module}.weight" in stored:
            assert A.shape[0] <= config["r"]
            products[f"{module}.weight"] = scale * B @ A
            continue
        leaf = "gate_up_proj" if module.endswith("experts.base_layer") else "down_proj"
        name = f"{module.removesuffix('.base_layer')}.{leaf}"
        experts = stored[name].shape[0]
        A, B = A.reshape(experts, -1, A.shape[-1]), B.reshape(B.shape[0], -1, experts)
        products[name] = scale * (B.permute(2, 0, 1) @ A).mT  # gpt-oss stores [experts, in, out]
    assert not tensors, "every tensor has a name that is known"
    return products


@pytest.mark.parametrize(
    "architecture", ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
)
def test_the_exported_adapter_changes_the_stored_weights(pack, tmp_path, architecture):
    packed = pack(architecture, "toy")[1]
    expected = logits(adapter_of(packed, tmp_path / "adapter"))
    merge(str(packed), tmp_path / "names", dtype="float32")
    dense = tmp_path / "dense"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "names")
    fresh = AutoModelForCausalLM.from_config(merged.config)  # is saved under the stored names
    fresh.load_state_dict(merged.state_dict())
    fresh.save_pretrained(dense)
    export_for_vllm(str(tmp_path / "adapter"), tmp_path / "vllm", model=str(packed))
    weights = load_file(dense / "model.safetensors")
    for name, product in read_by_the_rules_of_vllm(tmp_path / "vllm", weights).items():
        weights[name] += product
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    changed = AutoModelForCausalLM.from_pretrained(dense, experts_implementation="eager")
    torch.testing.assert_close(logits(changed), expected, rtol=1e-4, atol=1e-5)


def test_linear_layers_of_one_rank_need_no_export(pack, tmp_path):
    packed = pack("llama", "toy")[1]
    adapter_of(packed, tmp_path / "adapter")
    export_for_vllm(str(tmp_path / "adapter"), tmp_path / "vllm", model=str(packed))
    stored = {f"{path}.weight": t for path, t in load_model(packed).named_modules()}
    found = [read_by_the_rules_of_vllm(tmp_path / name, stored) for name in ("adapter", "vllm")]
    for name, product in found[0].items():
        torch.testing.assert_close(found[1][name], product)
    assert found[0].keys() == found[1].keys()


def test_layers_have_the_names_of_the_checkpoint(pack, tmp_path):
    """Transformers stores a Gemma 3 with images under other names than it has in memory."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        stored = {*file.keys()}
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "toy")
    adapter_of(tmp_path / "packed", tmp_path / "adapter")
    export_for_vllm(str(tmp_path / "adapter"), tmp_path / "vllm", model=str(tmp_path / "packed"))
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    found = {name.removeprefix(PREFIX).replace(".lora_A", "") for name in tensors if "_A" in name}
    assert found < stored
    assert any(name.startswith("language_model.model.layers.0.") for name in found)


@pytest.mark.skipif("sarvam_moe" not in CONFIG_MAPPING, reason="this transformers lacks the model")
def test_layers_that_are_stored_as_one_are_refused(pack, tmp_path):
    packed = pack("sarvam_moe", "toy")[1]
    adapter_of(packed, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"query_key_value holds other layers too; merge"):
        export_for_vllm(str(tmp_path / "adapter"), tmp_path / "vllm", model=str(packed))


def test_channel_scales_are_refused(pack, tmp_path):
    packed = pack("llama", "toy")[1]
    model = load_model(packed, device="cpu")
    add_lora(model, LoRASettings(rank=2, train_scales=True))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"got channel scales, which vLLM doesn't know.*merge"):
        export_for_vllm(str(tmp_path / "adapter"), tmp_path / "vllm", model=str(packed))
    assert not (tmp_path / "vllm").exists()


def test_the_command_writes_what_vllm_takes(pack, tmp_path, capsys):
    packed = pack("llama", "toy")[1]
    adapter_of(packed, tmp_path / "adapter")
    words = ["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "vllm"]
    assert main([*words, "--model", str(packed), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"out": str(tmp_path / "out"), "modules": 14, "rank": 4}
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


WRONG = {
    "": "--to vllm: expected --model MODEL beside it",
    "--model {packed} --max-shard-size 1GB": "--max-shard-size: expected a --to that writes",
    "--model {packed}": "expected adapter_config.json in it",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_sentence(pack, tmp_path, capsys, words):
    packed = pack("llama", "toy")[1]
    given = words.format(packed=packed).split()
    assert main(["convert", str(packed), str(tmp_path / "out"), "--to", "vllm", *given]) == 2
    assert WRONG[words] in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_command_names_it(pack, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "formats", list)
    packed = pack("llama", "toy")[1]
    assert main(["convert", str(packed), str(tmp_path / "out"), "--to", "vllm"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "it is of modulora-vllm, which isn't installed: run `pip install -r" in error


def test_a_model_is_not_written_in_a_format_of_adapters(pack, tmp_path):
    with pytest.raises(OptionError, match="expected a format of models, got one of adapters"):
        convert(pack("llama", "toy")[1], tmp_path / "out", "vllm")
