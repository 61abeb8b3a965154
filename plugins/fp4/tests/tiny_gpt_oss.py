"""A tiny gpt-oss in MXFP4, written tensor by tensor as its folders on the Hub are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

from modulora_core.tests.tiny_tokenizer import make_tokenizer

KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 640,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"], "eos_token_id": 1, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def save_dense(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SIZES), dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_packed(folder: Path) -> None:
    save_dense(folder)
    generator = torch.Generator().manual_seed(1)
    stored: dict[str, Tensor] = {}
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


def load_dequantized(folder: Path) -> nn.Module:
    """The folder as transformers makes it of floats."""
    from transformers import Mxfp4Config

    config = Mxfp4Config(dequantize=True)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return model.float()  # transformers before 5.24 makes the experts bf16, which is exact here
