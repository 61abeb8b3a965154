"""Tiny packed models with adapters that change their logits."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.tests.tiny_tokenizer import make_tokenizer

IDS = torch.arange(3, 27).view(2, 12)  # [batch, sequence]


def randomize(model, seed=0):
    """Change B from zero and channel scales from one, as training does, so that mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapter_layers(model):
        for B in layer.lora_B.values():
            B.data.copy_(torch.randn(B.shape, generator=generator) / 4)
        for scale in (*layer.input_scale.values(), *layer.output_scale.values()):
            scale.data.copy_(1 + torch.randn(scale.shape, generator=generator) / 4)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model, settings=None):
    """``model`` with an adapter that changes its logits."""
    add_lora(model, settings or LoRASettings(rank=4))
    randomize(model)
    return model


def save_llama_with_tokenizer(folder, **other_sizes):
    """Save a tiny random Llama that can read text; ``other_sizes`` override its config."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600,
             "max_position_embeddings": 128, "initializer_range": 0.2, **other_sizes}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
