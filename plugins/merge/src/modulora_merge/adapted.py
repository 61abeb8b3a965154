"""Gives a packed model with its adapter as the dense model that a calibration runs.

V = diag(v) Ŵ diag(u) + s · B A is made when it is read, one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import PackedSite
from modulora_core.hf.merge import delta_of, merged_parameter
from modulora_core.hf.peft_format import AdapterDelta
from modulora_core.models import ModelSource
from modulora_core.models.locate import Location
from modulora_core.models.skeleton import build_skeleton
from modulora_core.models.store import StoredTensor
from modulora_core.progress import quiet


@dataclass
class _AdaptedStore:
    """The parameters with the adapter's changes, fp32, under their names in memory."""

    checkpoint: PackedCheckpoint
    deltas: Mapping[str, AdapterDelta]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, stored in self.checkpoint.parameters.items():
            if isinstance(stored, PackedSite):
                shape, dtype = stored.parameter_shape, torch.float32
            else:
                shape, dtype = stored.shape, getattr(torch, stored.dtype)
                dtype = torch.float32 if dtype.is_floating_point else dtype
            nbytes = math.prod(shape) * dtype.itemsize
            self.tensors[name] = StoredTensor(shape, dtype, "merged", nbytes, "")

    def read(self, name: str) -> Tensor:
        delta = delta_of(self.checkpoint, name, self.deltas)
        return merged_parameter(self.checkpoint, name, delta, torch.float32)


def adapted_source(
    location: Location, checkpoint: PackedCheckpoint, deltas: Mapping[str, AdapterDelta]
) -> ModelSource:
    """The packed model at ``location`` with an adapter, dense."""
    with quiet():
        skeleton = build_skeleton(checkpoint.transformers_config(), torch.float32)
    store = _AdaptedStore(checkpoint, deltas)
    return ModelSource(location, store, skeleton, torch.float32, {}, transforms=[])
