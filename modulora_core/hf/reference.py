"""Refuse a reference that lacks the adapter of the model that it is compared with.

TRL's DPO, KTO, GRPO and RLOO compare a model with the model at the start. With PEFT that is the
model without its adapter. Otherwise TRL loads it with ``from_pretrained``, by the name in the
model's config. That base lacks an adapter that an earlier training left on the model.
"""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakSet

from torch import nn

from modulora_core.errors import AdapterError
from modulora_core.layers import LoRALayer

LOADED: WeakSet[nn.Module] = WeakSet()
"""The packed models of this process that transformers loaded, and their copies."""


def refuse_reference(name: str) -> None:
    """Refuse ``from_pretrained(name)`` while a model of that name has an adapter that changes it.

    Raises:
        AdapterError: there is such a model in this process.
    """
    if _is_trained(name):
        gc.collect()  # a model that nobody uses any more may be in a circle
    if _is_trained(name):
        raise AdapterError(
            f"from_pretrained of {name}: expected no model of that name with a trained adapter in "
            "this process, got one, whose adapter the reference of a TRL trainer would lack; give "
            "the trainer ref_model, or precompute_ref_log_probs=True for DPO; to load the base "
            "beside it, use modulora_core.load_model"
        )


def _is_trained(name: str) -> bool:
    named: list[Any] = [*LOADED]
    models = [model for model in named if model.config.name_or_path == name]
    return any(
        bool((values.detach() != start).any())
        for model in models
        for layer in model.modules()
        if isinstance(layer, LoRALayer)
        for start, parameters in (
            (0, layer.lora_B), (1, layer.input_scale), (1, layer.output_scale)
        )
        for values in parameters.values()
    )  # fmt: skip
