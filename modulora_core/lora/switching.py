"""Run a model without its adapters for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from modulora_core.layers import LoRALayer


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Make all adapters inactive within this block: the model computes as its base does."""
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    active = [layer.active for layer in layers]
    for layer in layers:
        layer.active = []
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.active = names
