"""One element of a packed weight changed, as loading other values into it would: to see what reads it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modulora_core.spec import PackedWeight, Quantizer

VISIBLE = 1e-3
"""A change of Ŵ counts from this share of its largest magnitude on."""

CANDIDATES = 64
"""How many elements of a tensor are tried."""


def changed_weight(quantizer: Quantizer, packed: PackedWeight) -> PackedWeight:
    """A copy whose Ŵ differs: an element of a packed tensor took the value of another one of it, which is never out of range.

    Codes are tried first: the smallest integers, of these the largest tensor.
    """
    rows = (0, packed.shape[0])
    W = quantizer.dequantize_tile(packed, rows, torch.float64).clone()
    for name in sorted(packed.tensors, key=lambda name: _rank(packed.tensors[name])):
        for tensor in _changed(packed.tensors[name]):
            changed = packed.layout.fill(_copies(packed) | {name: tensor})
            difference = (quantizer.dequantize_tile(changed, rows, torch.float64) - W).abs().max()
            if bool(difference.isfinite()) and float(difference) > VISIBLE * float(W.abs().max()):
                return changed
    pytest.fail(
        f"expected the weight to change with the packed tensors, got the same values whatever was changed in "
        f"{', '.join(packed.tensors)}: dequantize_tile gives a decoded weight that was kept",
        pytrace=False,
    )


def change_in_place(packed: PackedWeight, changed: PackedWeight) -> None:
    """Write the values of ``changed`` into the storages of ``packed``, as ``load_state_dict`` does."""
    for name, tensor in packed.tensors.items():
        tensor.copy_(changed.tensors[name])


def clone(packed: PackedWeight) -> PackedWeight:
    """The same weight on storages of its own."""
    return packed.layout.fill(_copies(packed))


def _copies(packed: PackedWeight) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in packed.tensors.items()}


def _rank(tensor: Tensor) -> tuple[bool, int, int]:
    return tensor.is_floating_point(), tensor.element_size(), -tensor.numel()


def _changed(tensor: Tensor) -> Iterator[Tensor]:
    """Copies of ``tensor`` in which one element has its neighbour's value, for elements spread over all of it."""
    flat = tensor.reshape(-1)
    differs = (flat[1:] != flat[:-1]).nonzero().flatten()
    for position in differs[:: max(1, len(differs) // CANDIDATES)].tolist():
        copy = flat.clone()
        copy[position] = flat[position + 1]
        yield copy.view(tensor.shape)
