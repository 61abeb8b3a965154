"""Refuse a device, processes or an optimizer that a run can't have, without importing torch."""

from __future__ import annotations

import difflib

from modulora_core.errors import OptionError
from modulora_core.training.config import FinetuneConfig


def check_device(config: FinetuneConfig, device: str, *, processes: int, shard: bool) -> None:
    """Refuse options of a run that its device or its processes cannot carry out.

    Args:
        config: the run; device: ``"cpu"``, or the kind of a GPU.
        processes: the number of processes; shard: whether they share one copy of the weights.

    Raises OptionError: an option needs another device, several processes, or no other option.
    """
    if device == "cpu":
        if config.dtype == "float16":
            raise OptionError("dtype float16: expected a GPU; on a CPU take float32 or bfloat16")
        if config.offload_activations:
            raise OptionError("offload_activations: expected a GPU, got a CPU; leave it out")
    elif config.mapped:
        raise OptionError(
            f"mapped: expected the device cpu, got {device}, to which weights are copied; leave "
            "mapped out"
        )
    if shard and processes == 1:
        raise OptionError(
            "shard: expected several processes, got one; start them with `torchrun` or "
            "`accelerate launch`, and give a plan their number"
        )
    if shard and config.mapped:
        raise OptionError("mapped: expected no shard beside it; leave one of the two out")


def check_optimizer_name(name: str) -> None:
    """Refuse a name that transformers doesn't know. Raises OptionError, with near misses."""
    from transformers.training_args import OptimizerNames

    names = [known.value for known in OptimizerNames]
    if name not in names:
        near = difflib.get_close_matches(name, names) or names
        raise OptionError(
            f"optim {name!r}: transformers has no such optimizer; expected {' or '.join(near)}"
        )
