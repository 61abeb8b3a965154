"""Tiny packed models with adapters whose B isn't zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modulora_core.adapters import LoRASettings, adapter_layers, add_lora

IDS = torch.arange(3, 27).view(2, 12)  # [batch, sequence]


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give B values, as training does: a new adapter's is zero, and would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapter_layers(model):
        for B in layer.lora_B.values():
            B.data.copy_(torch.randn(B.shape, generator=generator) / 4)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def trained(model: nn.Module, settings: LoRASettings | None = None) -> nn.Module:
    """``model`` with an adapter that changes its logits."""
    add_lora(model, settings or LoRASettings(rank=4))
    randomize(model)
    return model
