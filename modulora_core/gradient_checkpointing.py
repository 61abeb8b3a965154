"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): what a block computes is made again in the backward instead of kept.

Apart from :mod:`modulora_core.training`, whose Trainer takes a second and 100 MiB to import.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from modulora_core.kept_products import Form, KeptProducts
from modulora_core.offload import Place


def checkpoint_activations(
    model: PreTrainedModel, *, products: Form | Literal["none"] = "none", place: Place | None = None
) -> None:
    """Turn on gradient checkpointing. Not the reentrant kind: the first layer's inputs need no gradient.

    Args:
        products: how to keep the products with packed weights, which then aren't made again (:mod:`modulora_core.kept_products`);
            ``"none"`` keeps the inputs of blocks alone.
        place: where these products wait; None for the memory that they are in.
    """
    # transformers 5.24 renamed gradient_checkpointing_enable, and warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    around = {} if products == "none" else {"context_fn": KeptProducts(products, place)}
    enable({"use_reentrant": False, **around})
