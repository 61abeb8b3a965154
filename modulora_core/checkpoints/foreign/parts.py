"""Join layers that a foreign folder stores in parts: q, k and v of a layer ``qkv_proj``."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

from modulora_core.checkpoints.joined_rows import join
from modulora_core.errors import ModelError
from modulora_core.models.formats import ForeignWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def whole_layers(
    weights: Mapping[str, ForeignWeight],
    parts: Mapping[str, tuple[str, ...]],
    model: PreTrainedModel,
    stored: Container[str],
) -> dict[str, ForeignWeight]:
    """Join the parts of each layer that ``model`` has as one; other ``weights`` stay as they are.

    Args:
        parts: by the last word of a layer's name (:class:`FormatReader`).
        model: on the meta device.
        stored: the names of all tensors in the files.

    Raises:
        ModelError: a part has a bias.
    """
    layers, found = model.state_dict().keys(), dict(weights)
    for layer in layers:
        module = layer.removesuffix(".weight")
        parent, _, word = module.rpartition(".")
        names = [f"{parent}.{part}" for part in parts.get(word, ())]
        if module == layer or not names or not found.keys() >= set(names):
            continue
        biased = next((f"{name}.bias" for name in names if f"{name}.bias" in stored), None)
        if biased is not None:
            raise ModelError(
                f"{biased}: the model has one bias for {module}, and the files have one for each "
                "part of it, which isn't implemented"
            )
        found[module] = join([found.pop(name) for name in names])
    return found
