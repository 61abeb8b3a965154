"""Add up the bytes of a model's parameters by the kind of their layer."""

from __future__ import annotations

from typing import Any

from modulora_core.checkpoints.opening import open_model
from modulora_core.checkpoints.record import PackedSite


def weigh(model: str) -> list[dict[str, Any]]:
    """The parameters of each kind of layer, the heaviest kind first.

    Args:
        model: MODEL as every command takes it, packed or not.

    Returns:
        for each kind its name, its parameters, those that are packed, and the bytes of all.

    Raises:
        ModelError, CheckpointError: the model can't be opened.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for name, stored in open_model(model).parameters.items():
        module = name.rpartition(".")[0] or name  # "model.layers.0.mlp.up_proj"
        kind = module.rpartition(".")[2]
        found = kinds.setdefault(kind, {"kind": kind, "parameters": 0, "packed": 0, "bytes": 0})
        found["parameters"] += 1
        found["packed"] += isinstance(stored, PackedSite)
        found["bytes"] += stored.nbytes
    return sorted(kinds.values(), key=lambda kind: -int(kind["bytes"]))
