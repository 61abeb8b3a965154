"""Join experts that a foreign folder has as layers of their own into a stack.

transformers fuses the experts' layers: gates and ups of all experts become one parameter. Its
conversion of row numbers tells the rows of each expert, and packed rows are joined in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.conversion import Conversion
from modulora_core.models.formats import ForeignWeight
from modulora_core.models.sites import LinearSite
from modulora_core.spec import PackedWeight


def joined_experts(
    site: LinearSite,
    step: Conversion,
    weights: Mapping[str, ForeignWeight],
    model: PreTrainedModel,
) -> tuple[ForeignWeight, ...]:
    """One weight for each expert of ``site``.

    Args:
        step: the conversion that makes the stack; ``weights`` are its layers by name.
        model: on the meta device.

    Raises:
        ModelError: the layers aren't packed alike, or the conversion does more than move rows.
    """
    first = next(iter(weights.values()))
    rows = getattr(first.quantizer, "row_tensors", ())  # a KernelQuantizer may name them
    alike = all(
        (weight.quantizer.options, weight.layout.metadata, weight.layout.shape[1])
        == (first.quantizer.options, first.layout.metadata, site.in_features)
        for weight in weights.values()
    )
    if not rows or not alike:
        raise ModelError(
            f"{site.name}: expected experts that are packed alike, in rows that can be joined, got "
            f"{len(weights)} layers of {first.quantizer.spec.name} in the files"
        )
    joined = []
    for names in _rows_of_experts(site, step, weights, model):
        parts = [weights[name] for name in names]
        layout = first.quantizer.layout((site.out_features, site.in_features))
        tensors = tuple(tensor for part in parts for tensor in part.tensors)
        unpack = partial(_join, parts, layout.fill, rows)
        joined.append(ForeignWeight(tensors, first.quantizer, layout, unpack))
    return tuple(joined)


def _rows_of_experts(
    site: LinearSite,
    step: Conversion,
    weights: Mapping[str, ForeignWeight],
    model: PreTrainedModel,
) -> list[list[str]]:
    """For each expert the names of the layers whose rows it has, in their order."""
    counts = torch.tensor([weight.layout.shape[0] for weight in weights.values()])
    numbers = torch.arange(int(counts.sum()))[:, None].split(counts.tolist())
    stack = step.run(model, dict(zip(weights, numbers, strict=True)).__getitem__)[site.name]
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


def _join(
    parts: list[ForeignWeight],
    fill: Callable[[Mapping[str, Tensor]], PackedWeight],
    rows: tuple[str, ...],
    read: Callable[[str], Tensor],
) -> PackedWeight:
    """The rows of all parts as one weight. Raises CheckpointError: their other tensors differ."""
    packed = [part.unpack(read) for part in parts]
    tensors = dict(packed[0].tensors)
    for name in tensors:
        each = [one.tensors[name] for one in packed]
        if name in rows:
            tensors[name] = torch.cat(each)
        elif not all(torch.equal(each[0], other) for other in each[1:]):
            raise CheckpointError(
                f"{parts[0].tensors[0]} and {parts[-1].tensors[0]}: expected one {name} of both, "
                "which are fused in memory, got two; quantize with a shared one"
            )
    return fill(tensors)
