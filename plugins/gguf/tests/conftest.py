"""Tiny models, and adapters that change their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modulora_core.adapters.adapted import adapter_layers
from modulora_core.adapters.lora import add_lora
from modulora_core.adapters.save import save_adapter
from modulora_core.adapters.settings import LoRASettings
from modulora_core.checkpoints.loading import load_model

Adapted = Callable[..., torch.nn.Module]


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
