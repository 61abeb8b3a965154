"""Split the frozen weights over the processes of a run with FSDP2, or copy them to each (DDP).

transformers' Trainer and accelerate do the work: a decoder block is a group, gathered when its
forward or backward begins, and freed when it ends. The adapter is split in the same way.
"""

from __future__ import annotations

import os
from typing import Any

from modulora_core.errors import OptionError
from modulora_core.training.config import FinetuneConfig


def is_sharded(config: FinetuneConfig) -> bool:
    """Whether FSDP2 splits the model, as the config or ``accelerate launch --use_fsdp`` asks."""
    return config.shard or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_fsdp_version() -> None:
    """Refuse FSDP 1, which ``accelerate launch`` may ask for. Raises OptionError."""
    version = os.environ.get("FSDP_VERSION", "2")
    if version != "2":
        raise OptionError(
            f"fsdp_version: expected 2, got {version}; version 1 splits floating point weights only"
        )


def distributed_arguments(config: FinetuneConfig) -> dict[str, Any]:
    """The fields of TrainingArguments that concern several processes."""
    if not is_sharded(config):
        return {"ddp_find_unused_parameters": False}  # a forward uses every layer's adapter
    # Each process maps the model's files, and waits for no weights of another. transformers
    # checkpoints activations; accelerate's wrappers would also change the names of layers.
    split = {"version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False}
    return {"fsdp": True, "fsdp_config": split}


def split_without_gpus(accelerator: Any, plugin_arguments: dict[str, Any]) -> None:
    """Let processes on CPUs share a model too: accelerate itself asks for an accelerator."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
