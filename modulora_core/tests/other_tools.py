"""Folders that transformers and another tool write, and checks that they hold the same model."""

import warnings

import torch
from modulora_convert.convert import convert
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.inference.generate import generate
from modulora_core.inference.opened import open_to_run
from modulora_core.models.generation import Sampling
from modulora_core.tests.tiny_tokenizer import make_tokenizer
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

IDS = torch.arange(3, 27).view(2, 12)

_SIZES = {
    "llama": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 640,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "attention_bias": True,
    },
    "qwen3_moe": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 640,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 3, "num_experts_per_tok": 2,
    },
    "gpt2": {"vocab_size": 640, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 128,
             "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
}  # fmt: skip
"""Rows of whole blocks of 64: with AVX-512, bitsandbytes 0.50 misreads others."""


def save_quantized(folder, quantization, architecture="llama", dtype=torch.float32):
    """Save a tiny model as transformers does, quantized by one of its configs; with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**_SIZES[architecture]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tool's own
        quantized = AutoModelForCausalLM.from_pretrained(
            folder / "dense", quantization_config=quantization, dtype=dtype
        )
        quantized.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def load_with_transformers(folder, dtype=torch.float32):
    """The folder as its tool runs it, in training mode.

    For inference on the CPU, bitsandbytes rounds the scales to bfloat16.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def logits(model):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return model(IDS).logits.float()


def assert_trains_as_converted(folder, out):
    """The folder and its copy in our format give the same losses, which fall."""
    converted, data = out / "converted", out / "text.txt"
    data.write_text("a line to learn by heart, again and again\n" * 20)
    convert(str(folder), converted, "modulora")
    losses = []
    for model in (folder, converted):
        options = {
            "model": str(model), "out": str(out / f"adapter-{model.name}"), "data": str(data),
            "steps": 4, "batch_size": 1, "grad_accum": 1, "seq_len": 32, "dtype": "float32",
        }  # fmt: skip
        losses.append(finetune(FinetuneConfig.build(options)).losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def assert_used(folder, out):
    """The folder is merged, converted, finetuned and asked. Returns its dense model."""
    merge(str(folder), out / "dense", dtype="float32")
    convert(str(folder), out / "ours", "modulora")
    dense, expected = load_with_transformers(out / "dense"), logits(load_model(folder))
    assert torch.equal(logits(load_model(out / "ours")), expected)
    assert_close(logits(dense), expected)
    (out / "text.txt").write_text("a line to learn by heart, again and again\n" * 20)
    options = {
        "model": str(folder), "out": str(out / "adapter"), "data": str(out / "text.txt"),
        "steps": 2, "batch_size": 1, "grad_accum": 1, "seq_len": 32, "lr": 1e-2,
        "baseline": False,
    }  # fmt: skip
    finetune(FinetuneConfig.build(options))
    adapted = open_to_run(str(folder), adapter=str(out / "adapter"))
    assert generate(adapted, "a line", Sampling(2), raw=True).tokens
    merge(str(folder), out / "merged", adapter=out / "adapter", dtype="float32")
    found = logits(adapted.load())
    assert not torch.allclose(found, expected, atol=1e-3)
    assert_close(logits(load_with_transformers(out / "merged")), found)
    return dense


def assert_close(found, expected):
    """Equal to rounding in fp32, in relation to the largest value."""
    limit = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
