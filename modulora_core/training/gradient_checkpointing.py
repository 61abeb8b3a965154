"""Gradient checkpointing (arXiv 1604.06174): the backward recomputes activations, block by block.

torch does the work. ``keep_products`` is its selective checkpointing (arXiv 2205.05198): it saves
the products with packed weights and recomputes only the cheap rest.
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
        keep_products: save the products with packed weights, ``[..., out]`` each, so that the
            backward does not multiply again.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # transformers 5.24 renamed gradient_checkpointing_enable, and warns at the old name
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)
    # transformers lets embeddings require gradients, which reentrant checkpointing needs; then the
    # backward would recompute the frozen blocks too
    model.disable_input_require_grads()


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_product = operation is torch.ops.modulora.product.default
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE
