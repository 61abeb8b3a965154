"""A gpt-oss folder in MXFP4 is a MODEL as it is: trained, read and written without other bytes."""

import json
import shutil

import pytest
import torch
from modulora_convert.convert import convert
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

from modulora_core.cli import main
from modulora_core.errors import ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.packed_parameters import PackedStack
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.expert_gradients import worst_gradient
from modulora_core.tests.fuzzing import refused_or_runs
from modulora_core.tests.other_tools import logits
from modulora_core.tests.tiny_tokenizer import make_tokenizer

UP = "model.layers.0.mlp.experts.gate_up_proj"
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 640,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"], "eos_token_id": 1, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def save_dense(folder, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SIZES), dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_packed(folder):
    """Tensor by tensor, as the folders on the Hub are."""
    save_dense(folder)
    generator = torch.Generator().manual_seed(1)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        for part, shape, (low, high) in (
            ("blocks", (experts, rows, columns // 32, 16), (0, 256)),
            ("scales", (experts, rows, columns // 32), (120, 126)),
        ):
            drawn = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
            stored[f"{name}_{part}"] = drawn
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}
    (folder / "config.json").write_text(json.dumps(config))


def load_dequantized(folder):
    """The folder as transformers makes it of floats."""
    config = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return model.float()  # transformers before 5.24 makes the experts bf16, which is exact here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt-oss") / "packed"
    save_packed(path)
    return path


def test_logits_are_those_of_transformers(folder):
    ours, theirs = load_model(folder, dtype="float32"), load_dequantized(folder)
    stacks = [module for module in ours.modules() if isinstance(module, PackedStack)]
    assert [tuple(stack.shape) for stack in stacks] == 2 * [(4, 64, 192), (4, 96, 64)]
    expected = logits(theirs)
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=limit)


@pytest.mark.slow
def test_gradients_are_those_of_peft_on_the_decoded_experts(folder, tmp_path):
    assert worst_gradient(folder, tmp_path) < 1e-12


def test_it_comes_back_with_the_same_bytes(folder, tmp_path):
    convert(str(folder), tmp_path / "ours", "modulora")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "mxfp4")
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "theirs")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_dense_model_is_quantized_into_this_layout(tmp_path):
    save_dense(tmp_path / "dense", torch.bfloat16)
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "fp4", include=["*experts*"])
    convert(str(tmp_path / "packed"), tmp_path / "theirs", "mxfp4")
    expected = logits(load_model(tmp_path / "packed", dtype="float32"))
    found = logits(load_dequantized(tmp_path / "theirs"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    quantize(str(tmp_path / "dense"), tmp_path / "all", "fp4")
    with pytest.raises(ModelError, match=r"holds gpt-oss's experts only.*--include '\*experts\*'"):
        convert(str(tmp_path / "all"), tmp_path / "no", "mxfp4")
    quantize(str(tmp_path / "dense"), tmp_path / "nvfp4", "fp4", {"type": "nvfp4"},
             include=["*experts*"])  # fmt: skip
    with pytest.raises(ModelError, match=r"packed by fp4 nvfp4; mxfp4 holds .* type=mxfp4 only"):
        convert(str(tmp_path / "nvfp4"), tmp_path / "no", "mxfp4")


def test_damaged_folders_are_refused_in_one_sentence(folder, tmp_path, capsys):
    whole = load_file(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    blocks, scales = f"{UP}_blocks", f"{UP}_scales"
    cases = {
        f"{blocks}: expected uint8 [experts, out, in / 32, 16], got": {
            blocks: whole[blocks].flatten(2)
        },
        f"{scales}: expected uint8 [4, 192, 2]": {scales: whole[scales][:3]},
        f"{scales}: expected mxfp4 scales, got the byte 255": {
            scales: torch.full_like(whole[scales], 255)
        },
        # of another size of the model, and of no place in it
        f"{UP}: expected [4, 64, 192] by the config": {
            blocks: whole[blocks][:3], scales: whole[scales][:3]
        },
        "model.layers.7.mlp.experts.gate_up_proj is quantized there": {
            f"model.layers.7.mlp.experts.gate_up_proj_{part}": whole[f"{UP}_{part}"].clone()
            for part in ("blocks", "scales")
        },
    }  # fmt: skip
    data = tmp_path / "notes.txt"
    data.write_text("a line\n" * 40)
    for told, changed in cases.items():
        save_file(whole | changed, tmp_path / "model.safetensors", {"format": "pt"})
        _refused(tmp_path, data, told, capsys)
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    _refused(tmp_path, data, "truncated or damaged", capsys)


def _refused(folder, data, told, capsys):
    words = "evaluate", str(folder), "--data", str(data), "--seq-len", "32"
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in " ".join(error.split()), error
    assert error.count("error:") == 1


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(folder):
    refused_or_runs(folder)
