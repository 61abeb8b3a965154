"""Build the packed model of a checkpoint without its values, and check that it is whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from modulora_core.checkpoints.hf_quantizer import ModuLoRAConfig
from modulora_core.checkpoints.packed_modules import install
from modulora_core.errors import CheckpointError
from modulora_core.models.config import transformers_config
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.quiet import quiet
from modulora_core.packed import TensorLayout

if TYPE_CHECKING:
    from modulora_core.checkpoints.checkpoint import PackedCheckpoint


def packed_skeleton(checkpoint: PackedCheckpoint) -> Any:
    """Build the packed model on the meta device. Raises as :func:`check_whole` does."""
    foreign = checkpoint.foreign
    config = transformers_config(checkpoint.folder) if foreign is None else foreign.source.config
    with quiet():
        model: Any = build_skeleton(config, torch.float32)
    model.config.quantization_config = ModuLoRAConfig(record=checkpoint.record)
    install(model, checkpoint.record)
    return model


def check_whole(checkpoint: PackedCheckpoint) -> None:
    """Refuse a checkpoint that :func:`modulora_core.load_model` would refuse. Reads headers only.

    Raises:
        ModelError: transformers can't build the model of the config.
        CheckpointError: a tensor is missing, unknown to the model, or of another shape.
        PluginError: a quantizer isn't installed or can't be used.
    """
    model = packed_skeleton(checkpoint)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: list(layout.shape) for name, layout in _stored(checkpoint)}
    tied = set(model.all_tied_weights_keys) - stored.keys()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for name in sorted(wanted.keys() | stored.keys()):
        unused = name not in wanted and any(re.search(pattern, name) for pattern in ignored)
        if name not in tied and not unused and wanted.get(name) != stored.get(name):
            raise CheckpointError(
                f"{checkpoint.folder}: {name}: expected {wanted.get(name, 'none')} by config.json, "
                f"got {stored.get(name, 'none')} in the files, which don't belong together; "
                "download or quantize the model again"
            )


def _stored(checkpoint: PackedCheckpoint) -> Iterator[tuple[str, TensorLayout]]:
    """The name and layout of each stored tensor."""
    for name, kept in checkpoint.parameters.items():
        if isinstance(kept, TensorLayout):
            yield name, kept
        else:
            yield from kept.tensors(name)
