"""Equality to the bit: also where there is NaN, and where zeros differ in sign."""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_core.spec import PackedWeight


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def check_same_bytes(expected: PackedWeight, found: PackedWeight, what: str) -> None:
    """Fail where two packed weights differ in layout or bytes; ``what`` says how ``found`` came about."""
    assert found.layout == expected.layout, (
        f"{what}: expected the layout {expected.layout}, got {found.layout}"
    )
    differing = [
        name
        for name, tensor in expected.tensors.items()
        if not same_bits(tensor, found.tensors[name])
    ]
    assert differing == [], f"{what}: expected the same bytes, got others in {', '.join(differing)}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
