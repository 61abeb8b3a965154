"""Run a model without its adapter for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from modulora_core.adapters.adapted import adapter_layers


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Make the adapter inactive within this block: the model computes as its base does."""
    layers = [layer for _, layer in adapter_layers(model)]
    active = [layer.active for layer in layers]
    for layer in layers:
        layer.active = [other for other in layer.active if other != "default"]
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.active = names
