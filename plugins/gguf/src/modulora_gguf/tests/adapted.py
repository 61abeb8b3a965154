"""Adapters of a chosen size, on any model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings


def adapted(
    model: Path, out: Path, std: float = 1.0, settings: LoRASettings | None = None
) -> nn.Module:
    """The model with an adapter, saved to ``out``, whose B has the standard deviation ``std``."""
    loaded: nn.Module = load_model(model)
    add_lora(loaded, settings or LoRASettings(rank=3, alpha=12.0))
    generator = torch.Generator().manual_seed(0)
    for _, layer in adapter_layers(loaded):
        B = layer.parameters_of("default")["lora_B"].data
        B.copy_(torch.randn(B.shape, generator=generator) * std)
    save_adapter(loaded, out)
    return loaded
