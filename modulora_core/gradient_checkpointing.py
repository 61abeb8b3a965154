"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): what a block computes is made again in the backward instead of kept.

Apart from :mod:`modulora_core.training`, whose Trainer takes a second and 100 MiB to import.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn on gradient checkpointing. Not the reentrant kind: the first layer's inputs need no gradient."""
    # transformers 5.24 renamed gradient_checkpointing_enable, and warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
