"""Make tiny causal language models of many architectures, with random values."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16}
_LLAMA4 = {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
}
_ROUTED = {**_ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

ARCHITECTURES = {
    "llama": ("llama", {**_GROUPED, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 8}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "gpt2": ("gpt2", {**_GPT2, **_ENDS}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "tie_word_embeddings": False}),
    "opt": ("opt", {**_COMMON, **_OPT, "pad_token_id": 1}),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 8}),
    "gemma3_text": ("gemma3_text", {**_GROUPED, **_SLIDING, "head_dim": 8}),
    "phi": ("phi", _COMMON),
    "phi3": ("phi3", _GROUPED),
    "falcon": ("falcon", {**_COMMON}),
    "mixtral": ("mixtral", {**_GROUPED, **_LOCAL}),
    "qwen2_moe": ("qwen2_moe", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, **_EXPERTS, "head_dim": 8}),
    "gpt_oss": ("gpt_oss", {**_GROUPED, **_LOCAL, "head_dim": 8}),
    "llama4_text": ("llama4_text", {**_GROUPED, **_LOCAL, **_LLAMA4, "head_dim": 8}),
    "deepseek_v3": ("deepseek_v3", {**_COMMON, **_LATENT, **_ROUTED, "num_key_value_heads": 4}),
    "sarvam_moe": (
        "sarvam_moe",
        {**_GROUPED, **_ROUTED, "head_dim": 8},
    ),  # one tensor becomes q, k and v
}
ARCHITECTURES = {name: entry for name, entry in ARCHITECTURES.items() if entry[0] in CONFIG_MAPPING}

FAMILIES = ("llama-biased", "gpt2", "gemma3_text", "falcon", "mixtral", "gpt_oss")
"""One for each kind of layer: biased, Conv1D, sliding, fused, experts, experts ``[in, out]``."""

EVERY_ARCHITECTURE = pytest.mark.parametrize(
    "architecture",
    [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES],
)
"""Each push tests the families, ``make test-all`` all architectures."""


def tiny_config(architecture):
    model_type, options = ARCHITECTURES[architecture]
    return CONFIG_MAPPING[model_type](**options)


def tiny_model(architecture, dtype=torch.float32, seed=0):
    """A model with random norms and biases too, so that a wrong order or sign shows."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    return model.eval()


def save_tiny_model(architecture, folder, dtype=torch.float32, max_shard_size="1GB"):
    """Save a tiny model as transformers does, by default in one file. Returns ``folder``."""
    tiny_model(architecture, dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
