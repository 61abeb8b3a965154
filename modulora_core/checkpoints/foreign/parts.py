"""Join layers of a foreign folder into the weights that the model's code has.

    q, k and v of a layer ``qkv_proj``     one weight, if the format names the parts
    experts                                a stack; gates and ups of all experts are one parameter

transformers fuses experts while it loads. Its conversion of row numbers tells the rows of each
expert. If only rows differ, packed rows become one weight in that order, else parts of one
(:mod:`modulora_core.checkpoints.joined_rows`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from transformers import PreTrainedModel

from modulora_core.checkpoints.joined_rows import join
from modulora_core.errors import ModelError
from modulora_core.models.conversion import Conversion
from modulora_core.models.formats import ForeignWeight, Read
from modulora_core.models.sites import LinearSite
from modulora_core.spec import PackedWeight


def whole_layers(
    weights: Mapping[str, ForeignWeight],
    parts: Mapping[str, tuple[str, ...]],
    model: PreTrainedModel,
    stored: Container[str],
) -> dict[str, ForeignWeight]:
    """Join the parts of each layer that ``model`` has as one; other ``weights`` stay as they are.

    Args:
        parts: by the last word of a layer's name (:class:`FormatReader`).

    Raises ModelError: a part has a bias.
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


def joined_experts(
    site: LinearSite,
    conversion: Conversion,
    weights: Mapping[str, ForeignWeight],
    model: PreTrainedModel,
) -> tuple[ForeignWeight, ...]:
    """One weight for each expert of ``site``.

    Args:
        conversion: the conversion that makes the stack; ``weights`` are its layers by name.

    Raises ModelError: the experts aren't packed alike, or the conversion does more than move rows.
    """
    joined = [
        _joined([weights[name] for name in names])
        for names in _rows_of_experts(site, conversion, weights, model)
    ]
    first, shape = joined[0], (site.out_features, site.in_features)
    for other in joined:
        alike = (other.quantizer, other.layout) == (first.quantizer, first.layout)
        if not alike or other.layout.shape != shape:
            raise ModelError(
                f"{site.name}: expected experts of {list(shape)} that are packed alike, got "
                f"{other.layout.quantizer} {list(other.layout.shape)} in the files"
            )
    return tuple(joined)


def _joined(parts: list[ForeignWeight]) -> ForeignWeight:
    """The rows of all parts as one weight."""
    first = parts[0]
    rows = getattr(first.quantizer, "row_tensors", ())  # a KernelQuantizer may name them
    kinds = {(part.quantizer, part.layout.shape[1]) for part in parts}
    if len(parts) == 1:
        return first
    if len(kinds) > 1 or not first.layout.tensors.keys() <= set(rows):
        return join(parts)
    layout = first.quantizer.layout((sum(p.layout.shape[0] for p in parts), first.layout.shape[1]))

    def unpack(read: Read) -> PackedWeight:
        packed = [part.unpack(read).tensors for part in parts]
        return layout.fill({name: torch.cat([one[name] for one in packed]) for name in packed[0]})

    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return ForeignWeight(tensors, first.quantizer, layout, unpack)


def _rows_of_experts(
    site: LinearSite,
    conversion: Conversion,
    weights: Mapping[str, ForeignWeight],
    model: PreTrainedModel,
) -> list[list[str]]:
    """For each expert the names of the layers whose rows it has, in their order."""
    counts = torch.tensor([weight.layout.shape[0] for weight in weights.values()])
    numbers = torch.arange(int(counts.sum()))[:, None].split(counts.tolist())
    stack = conversion.run(model, dict(zip(weights, numbers, strict=True)).__getitem__)[site.name]
    stack = stack.mT if site.transposed else stack
    if stack.shape != (site.experts, site.out_features, 1):
        raise ModelError(f"{site.name}: its experts in the files aren't rows of it")
    owner = torch.repeat_interleave(counts)[stack[:, :, 0]]
    names = list(weights)
    found = [owners.unique_consecutive().tolist() for owners in owner]
    for rows, owners in zip(stack, found, strict=True):
        if not torch.equal(rows, torch.cat([numbers[i] for i in owners])):
            raise ModelError(f"{site.name}: its experts in the files have another order of rows")
    return [[names[i] for i in owners] for owners in found]
