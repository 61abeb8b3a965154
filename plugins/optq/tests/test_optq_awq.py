"""AWQ folders, written word by word as AutoAWQ does, are read to the last bit."""

import json

import pytest
import torch
from modulora_optq.quantizer import OPTQ
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.tests.fuzzing import refused_or_runs
from modulora_core.tests.other_tools import logits
from modulora_core.tests.tiny_tokenizer import make_tokenizer

UP = "model.layers.0.mlp.up_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's order_map: four bits of a word after the other hold these columns of [in, out]."""


def word(codes):
    value = sum(codes[column] << 4 * place for place, column in enumerate(ORDER))
    return value - 2**32 if value >= 2**31 else value


def pack(codes):
    """Codes ``[n, out]`` to words, int32 ``[n, out / 8]``."""
    rows = [[word(eight) for eight in row] for row in codes.view(len(codes), -1, 8).tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def save_awq(folder, group=32, kept=("lm_head",), **config):
    """Save a tiny Llama of random codes. Returns the same model, dense."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 640}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=128))
    model.half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    stored = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.rpartition(".")[2] in kept:
            continue
        columns, rows = module.in_features, module.out_features
        size = columns if group == -1 else group
        q, z = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (columns // size, rows))
        s = (torch.rand(columns // size, rows) / 64 + 0.001).half()
        each = torch.arange(columns) // size
        module.weight.data = ((q - z[each]).float() * s.float()[each]).T.contiguous()
        del stored[f"{name}.weight"]
        parts = {"qweight": pack(q), "qzeros": pack(z), "scales": s}
        stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
        "zero_point": True, "modules_to_not_convert": None,
    }  # fmt: skip
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = quantization | config
    (folder / "config.json").write_text(json.dumps(values))
    return model.float().eval()


def change(folder, **tensors):
    whole = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(whole | tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("group", "kept"), [(32, ("lm_head",)), (-1, ()), (16, ("lm_head", "q_proj"))], ids=str
)
def test_every_weight_is_read_to_the_last_bit(group, kept, tmp_path):
    dense = save_awq(tmp_path, group, kept)
    checkpoint = open_packed(tmp_path)
    assert len(checkpoint.record.weights) == 8 - len(kept)
    for name, _ in checkpoint.record.items():
        (packed,) = checkpoint.packed(name)
        W = OPTQ().dequantize_tile(packed, (0, packed.shape[0]), torch.float32)
        assert torch.equal(W, dense.get_parameter(name)), name
    model = load_model(tmp_path, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


def test_the_config_of_older_folders_is_read(tmp_path):
    save_awq(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    older = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(older))
    assert len(open_packed(tmp_path).record.weights) == 7


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"version": "gemv"}, "'version': expected 'gemm', got 'gemv'.*Take the model's gemm"),
        ({"bits": 3}, "'bits': expected 4, got 3"),
    ],
)
def test_other_layouts_are_refused_by_name(config, match, tmp_path):
    save_awq(tmp_path, **config)
    (tmp_path / "model.safetensors").unlink()  # known before the weights are there
    with pytest.raises(ModelError, match=match):
        open_packed(tmp_path)


def test_damaged_folders_and_scaled_activations_are_refused(tmp_path):
    save_awq(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    zeros, scales = whole[f"{UP}.qzeros"].clone(), whole[f"{UP}.scales"].clone()
    change(tmp_path, **{f"{UP}.qzeros": zeros[1:]})
    with pytest.raises(CheckpointError, match=rf"{UP}.qzeros: expected int32 \[2, 12\] by qweight"):
        open_packed(tmp_path)
    change(tmp_path, **{f"{UP}.qzeros": zeros, f"{UP}.scales": scales * float("inf")})
    with pytest.raises(CheckpointError, match=f"{UP}.scales: expected finite values"):
        load_model(tmp_path)
    change(tmp_path, **{f"{UP}.scales": scales, "model.layers.0.mlp.act.scales": scales[0].clone()})
    with pytest.raises(ModelError, match=r"mlp\.act\.scales: .* scales of activations"):
        open_packed(tmp_path)


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(tmp_path):
    save_awq(tmp_path)
    refused_or_runs(tmp_path)
