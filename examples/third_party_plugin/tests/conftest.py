from __future__ import annotations

import pytest
import torch
from modulora_half_quadratic import packing, reference

from modulora_core import kernels
from modulora_core.spec import PackedWeight


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def plain_torch(monkeypatch):
    """The path that runs where no kernel can."""
    monkeypatch.setattr(kernels, "load", lambda module, device: None)


@pytest.fixture
def by_the_reference():
    """All of Ŵ of a packed weight, fp32, from reference.py and packing.py alone."""

    def dequantize(packed: PackedWeight) -> torch.Tensor:
        tensors, metadata = packed.tensors, packed.metadata
        codes = packing.unpack(tensors["codes"], metadata["bits"], packed.shape[1])
        scales, offsets = (tensors[name].float() * tensors["unit"] for name in ("scales", "offsets"))
        return reference.dequantize(codes, scales, offsets, metadata["group_size"])

    return dequantize
