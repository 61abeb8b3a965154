"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): the backward recomputes a block instead of keeping its activations.

torch does the work. ``keep_products`` is its selective checkpointing (Korthikanti et al. 2022, arXiv 2205.05198): the products with packed
weights are kept, and only the cheap rest is recomputed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel, *, keep_products: bool = False) -> None:
    """Turn on gradient checkpointing.

    Args:
        keep_products: keep the products with packed weights, ``[..., out]`` each, so that the backward does not multiply again.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # transformers 5.24 renamed gradient_checkpointing_enable and warns of the old name
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable(options)
    # transformers makes embeddings require gradients for reentrant checkpointing; then frozen blocks would be recomputed too
    model.disable_input_require_grads()


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_product = operation is torch.ops.modulora.product.default
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE
