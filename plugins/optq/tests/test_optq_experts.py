"""GPTQ and AWQ folders of mixtures, whose experts are layers of their own, are used as they are."""

import json

import pytest
import torch
from modulora_optq.formats import words
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modulora_core.tests.other_tools import (
    assert_close,
    assert_used,
    load_with_transformers,
    logits,
)
from modulora_core.tests.tiny_tokenizer import make_tokenizer

GROUP = 32
SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 640,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 3},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True,
        "checkpoint_format": "gptq_v2"}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm",
       "zero_point": True}  # fmt: skip


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def by_awq(codes):
    """Codes ``[n, out]`` to words, int32 ``[n, out / 8]``."""
    eights = codes.view(len(codes), -1, 8)
    words = torch.stack([eights[..., column] << 4 * i for i, column in enumerate(AWQ_ORDER)])
    return words.sum(0).to(torch.int32)


def random_layer(name, shape, method):
    """A random weight ``[out, in]``, and its tensors in the files.

    GPTQ's groups are of any columns, in each layer of others.
    """
    out, columns = shape
    q, z = torch.randint(0, 16, (columns, out)), torch.randint(0, 16, (columns // GROUP, out))
    s = (torch.rand(columns // GROUP, out) / 64 + 0.001).half()
    group = torch.arange(columns) // GROUP
    if method == "awq":
        parts = {"qweight": by_awq(q), "qzeros": by_awq(z), "scales": s}
    else:
        group = group[torch.randperm(columns)]
        zeros = words.pack(z.to(torch.uint8).t(), 4).t().contiguous()
        parts = {"qweight": words.pack(q.to(torch.uint8), 4), "qzeros": zeros, "scales": s,
                 "g_idx": group.int()}  # fmt: skip
    weight = ((q - z[group]).float() * s.float()[group]).t().contiguous()
    return weight, {f"{name}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize(
    ("config", "architecture"), [(GPTQ, "qwen3_moe"), (AWQ, "mixtral")], ids=["gptq", "awq"]
)
def test_experts_are_used_as_they_are(config, architecture, tmp_path):
    torch.manual_seed(0)
    model = CONFIG_MAPPING[architecture](**SIZES, **EXPERTS[architecture])
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path / "dense-base")
    stored, dense = {}, {}
    for name, tensor in load_file(tmp_path / "dense-base" / "model.safetensors").items():
        module, parts = name.removesuffix(".weight"), {name: tensor}
        dense[name] = tensor
        if tensor.dim() == 2 and not any(part in name for part in ("gate.w", "embed", "head")):
            dense[name], parts = random_layer(module, tuple(tensor.shape), config["quant_method"])
        stored |= parts
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(dense, tmp_path / "dense-base" / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((tmp_path / "dense-base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    make_tokenizer().save_pretrained(folder)
    made = assert_used(folder, tmp_path)
    assert_close(logits(made), logits(load_with_transformers(tmp_path / "dense-base")))
