"""Refuse packed weights whose scales are NaN or infinite: they would decode to zeros."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from modulora_core.packed_parameters import PackedParameter


def check_scales(model: nn.Module, path: str = "", skip: tuple[str, ...] = ()) -> None:
    """Check all packed weights of ``model`` but those whose path begins with one of ``skip``.

    Raises:
        CheckpointError: a scale is NaN or infinite; the message begins with ``path`` and the name.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PackedParameter) or name.startswith(skip):
            continue
        if module.device.type != "meta":
            module.quantizer.check_values(module.packed, f"{path}{name}")


def check_at_first_touch(block: nn.Module, path: str) -> None:
    """Check the packed weights of ``block`` when it first runs, and reads their pages anyway."""
    hooks: list[Any] = []
    hooks.append(block.register_forward_pre_hook(partial(_check_once, f"{path}.", hooks)))


def _check_once(path: str, hooks: list[Any], block: nn.Module, _: Any) -> None:
    check_scales(block, path)
    hooks.pop().remove()
