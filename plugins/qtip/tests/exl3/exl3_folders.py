"""Tiny EXL3 folders, as ExLlamaV3 and GPTQModel write them, and the same models, dense."""

import json

import torch
from exl3_tensors import MULTIPLIERS, random_layer, weight
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modulora_core.tests.tiny_tokenizer import make_tokenizer

SIZES = {
    "llama": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 640,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 128, "tie_word_embeddings": False, "attention_bias": True,
    },
    "phi3": {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 640,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0,
    },
    "qwen3_moe": {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 640,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 128, "moe_intermediate_size": 128, "num_experts": 3,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 640,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 128, "num_local_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["full_attention"],
    },
}  # fmt: skip

UP = "model.layers.0.mlp.up_proj"


def mixed(name, number):
    """1 to 8 bits, all codes, and signs in some layers."""
    code = ("3inst", "mcg", "mul1")[number % 3]
    bits = 6 if name == "lm_head" else 1 + (number + 3) % 8
    return {"bits": bits, "code": code, "signs": number % 5 == 4}


def alike(bits, code):
    """The same for all layers but the head, which has 6 bits."""
    return lambda name, _: {"bits": 6 if name == "lm_head" else bits, "code": code}


def save_exl3(
    folder, architecture="llama", choice=mixed, *, storage=True, parts=None, in_config=True, **sizes
):
    """Save a tiny model of random tensors. Returns the same model, dense, in fp32.

    Args:
        choice: gives ``bits``, ``code`` and ``signs`` of a layer, by its name and its number.
        storage: write ``tensor_storage``, as newer files have it.
        parts: rows of each part of a layer that the files have in parts, by its last word.
        in_config: put the quantization config into config.json, else in a file of its own.
        sizes: of the config.
    """
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**{**SIZES[architecture], **sizes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    stored = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    linears = [n for n in stored if n.endswith(".weight") and _is_linear(n, stored[n])]
    head = "lm_head.weight"
    if head not in linears:  # a tied head is stored on its own
        linears.append(head)
        stored[head] = stored["model.embed_tokens.weight"]
    dense, written = {}, {}
    for name in linears:
        W, module = stored.pop(name), name.removesuffix(".weight")
        word = module.rpartition(".")[2]
        rows = {word: len(W)} if word not in (parts or {}) else (parts or {})[word]
        pieces = []
        for part, count in rows.items():
            path, shape = module.removesuffix(word) + part, (count, W.shape[1])
            made = random_layer(padded(shape), **choice(path, len(written)), seed=len(written))
            written[path] = made
            pieces.append(weight(made)[: shape[0], : shape[1]])
            bias = stored.get(f"{path}.bias")
            if bias is not None:
                stored[f"{path}.bias"] = nn.functional.pad(bias, (0, padded(shape)[0] - count))
        dense[name] = torch.cat(pieces)
    tensors = {f"{path}.{n}": t for path, made in written.items() for n, t in made.items()}
    save_file({**stored, **tensors}, folder / "model.safetensors", {"format": "pt"})
    _write_config(folder, written, stored, storage, in_config)
    state = {**stored, **dense}
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(_in_memory(model, state))
    return model.eval()


def padded(shape):
    """Multiples of 128."""
    return -(-shape[0] // 128) * 128, -(-shape[1] // 128) * 128


def _is_linear(name, tensor):
    kept = ("embed_tokens", "mlp.gate.", "norm")
    return tensor.dim() == 2 and not any(word in name for word in kept)


def _in_memory(model, state):
    """Experts in stacks, biases without padding."""
    expected = model.state_dict()
    for name in expected.keys() - state.keys():
        parent, _, word = name.rpartition(".")
        words = ("gate_proj", "up_proj") if word == "gate_up_proj" else (word,)
        count = len(expected[name])
        rows = [[state[f"{parent}.{i}.{w}.weight"] for w in words] for i in range(count)]
        state[name] = torch.stack([torch.cat(one) for one in rows])
    return {
        n: state[n][: t.shape[0]] if state[n].dim() == 1 else state[n] for n, t in expected.items()
    }


def _write_config(folder, written, stored, storage, in_config):
    quantization = {
        "quant_method": "exl3", "version": "0.0.6", "bits": 3.0, "head_bits": 6,
        "calibration": {"rows": 100, "cols": 2048}, "out_scales": "auto",
    }  # fmt: skip
    if storage:
        quantization["tensor_storage"] = {
            path: {
                "stored_tensors": {
                    f"{path}.{n}": {"shape": list(t.shape), "torch_dtype": str(t.dtype)[6:]}
                    for n, t in made.items()
                }
                | _bias(path, stored),
                "quant_format": "exl3",
                "bits_per_weight": made["trellis"].shape[-1] / 16,
                **{f"{c}_multiplier": m for c, m in MULTIPLIERS.items() if c in made},
            }
            for path, made in written.items()
        }
    values = json.loads((folder / "config.json").read_text())
    if in_config:
        values["quantization_config"] = quantization
    else:
        (folder / "quantization_config.json").write_text(json.dumps(quantization))
    (folder / "config.json").write_text(json.dumps(values))


def _bias(path, stored):
    bias = stored.get(f"{path}.bias")
    about = {} if bias is None else {"shape": list(bias.shape), "torch_dtype": "float16"}
    return {f"{path}.bias": about} if about else {}
