"""Tiny models, and adapters that change their logits."""

import pytest
import torch

from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings


@pytest.fixture(scope="session")
def adapted():
    """``adapted(path, out, std)`` puts an adapter with B of size ``std`` on a model, and saves
    it."""

    def make(path, out, std=1.0):
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
