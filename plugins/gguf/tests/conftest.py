"""Tiny models, and adapters that change their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulora_core.adapters.lora import LoRASettings, adapter_layers, add_lora
from modulora_core.adapters.save_load import save_adapter
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.tests.tiny_models import tiny_config
from modulora_core.tests.tiny_tokenizer import make_tokenizer

Adapted = Callable[..., torch.nn.Module]
SaveFolder = Callable[..., None]


@pytest.fixture(scope="session")
def adapted() -> Adapted:
    """``adapted(path, out, std)`` puts an adapter with B of size ``std`` on a model, and saves
    it."""

    def make(path: Path, out: Path, std: float = 1.0) -> torch.nn.Module:
        model = load_model(path)
        add_lora(model, LoRASettings(rank=3, alpha=12.0))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, layer in adapter_layers(model):
                B = layer.parameters_of("default")["lora_B"]
                B.copy_(torch.randn(B.shape, generator=generator) * std)
        save_adapter(model, out)
        return model

    return make


@pytest.fixture(scope="session")
def save_folder() -> SaveFolder:
    """``save_folder(architecture, folder)`` saves a tiny model with rows of 64 weights, and a
    byte-level tokenizer."""

    def save(architecture: str, folder: Path, window: int | None = None) -> None:
        config, tokenizer = tiny_config(architecture), make_tokenizer()
        config.intermediate_size = config.moe_intermediate_size = 64
        config.vocab_size = len(tokenizer) + 8  # padded
        config.norm_topk_prob, config.sliding_window = True, window
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save
